"""The fractional relaxation: its two formulas agree, and its penalties bound the cost of each decision."""

from __future__ import annotations

import numpy as np
import pytest

from solver import KnapsackProblem
from solver.relaxation import Relaxation
from tests.oracles.knapsack import KINDS, TOLERANCE, brute_force, random_problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_both_formulas_give_the_bound(kind: str, seed: int):
    relaxation = Relaxation.of(random_problem(seed, num_items=50, kind=kind))
    surplus = relaxation.values - relaxation.price * relaxation.costs
    budget = min(relaxation.budget, int(relaxation.costs.sum()))
    assert relaxation.bound == pytest.approx(relaxation.price * budget + np.maximum(0, surplus).sum(), rel=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_deciding_an_item_against_the_relaxation_costs_its_penalty(kind: str):
    problem = random_problem(1, num_items=12, kind=kind)
    relaxation = Relaxation.of(problem)
    for rank, penalty in enumerate(relaxation.penalties()):
        item = relaxation.positions[rank]
        others = np.delete(np.arange(problem.num_items), item)
        taken = rank >= relaxation.break_rank
        rest = KnapsackProblem(
            problem.values[others], problem.costs[others], relaxation.budget - taken * int(problem.costs[item])
        )
        flipped = brute_force(rest) + taken * problem.values[item]
        assert flipped <= (relaxation.bound - penalty) * (1 + TOLERANCE)


def test_ranks_are_by_density_and_ties_by_position():
    relaxation = Relaxation.of(KnapsackProblem(np.array([1.0, 4.0, 2.0, 9.0]), np.array([1, 4, 1, 9]), 9))
    assert relaxation.positions.tolist() == [2, 0, 1, 3]
    assert (relaxation.break_rank, relaxation.room, relaxation.price) == (3, 3, 1.0)
    assert relaxation.bound == 2 + 1 + 4 + 3


def test_budget_that_no_subset_can_spend_is_not_counted():
    relaxation = Relaxation.of(KnapsackProblem(np.ones(5), np.full(5, 384), 1000))
    assert (relaxation.budget, relaxation.room, relaxation.bound) == (768, 0, 2.0)

"""The frontier never decreases, and each of its points is an existing subset."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from solver import CoreKnapsack, Frontier, Greedy, KnapsackProblem, Solution, Solver, choice_frontier, frontier
from solver.solution import certify
from tests.oracles import multiple_choice as choice_oracle
from tests.oracles.knapsack import KINDS, TOLERANCE, brute_force, random_problem


@pytest.mark.parametrize("solver", [Greedy(), CoreKnapsack(), CoreKnapsack(relative_gap=1e-2)], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_points_are_feasible_bounded_and_never_descend(solver: Solver, kind: str):
    problem = random_problem(2, num_items=11, kind=kind)
    budgets = np.linspace(0, problem.costs.sum(), 25).astype(int)
    curve = frontier(problem.values, problem.costs, budgets, solver)

    assert (curve.costs <= curve.budgets).all()
    assert (np.diff(curve.values) >= 0).all()
    assert (np.diff(curve.bounds) >= 0).all()
    assert (curve.values <= curve.bounds).all()
    for budget, value, bound in zip(curve.budgets, curve.values, curve.bounds, strict=True):
        optimum = brute_force(KnapsackProblem(problem.values, problem.costs, int(budget)))
        assert value <= optimum * (1 + TOLERANCE)
        assert optimum <= bound * (1 + TOLERANCE)


@pytest.mark.parametrize("kind", choice_oracle.KINDS)
def test_points_of_choices_are_bounded_and_never_descend(kind: str):
    problem = choice_oracle.random_choice(2, kind, num_classes=2, num_options=3, num_members=2)
    budgets = np.linspace(0, problem.costs.sum(), 25).astype(int).tolist()
    curve = choice_frontier(problem, budgets)

    assert curve.budgets.tolist() == sorted(set(budgets))
    assert (curve.costs <= curve.budgets).all()
    assert (np.diff(curve.values) >= 0).all()
    assert (np.diff(curve.bounds) >= 0).all()
    for budget, value, bound in zip(curve.budgets, curve.values, curve.bounds, strict=True):
        optimum = choice_oracle.brute_force(replace(problem, budget=int(budget)))
        assert optimum * (1 - 1e-4) <= value <= optimum * (1 + TOLERANCE)
        assert optimum <= bound * (1 + TOLERANCE)


class Fickle:
    """A solver that takes nothing at even budgets."""

    def solve(self, problem: KnapsackProblem) -> Solution:
        if problem.budget % 2:
            return Greedy().solve(problem)
        return certify(problem, np.zeros(problem.num_items, dtype=bool), bound=100.0, seconds=0.0)


def test_a_subset_is_kept_where_a_larger_budget_did_worse():
    curve = frontier(np.array([3.0, 2.0, 1.0]), np.array([1, 1, 1]), [1, 2, 3, 4], Fickle())
    assert curve.values.tolist() == [3, 3, 6, 6]
    assert curve.costs.tolist() == [1, 1, 3, 3]
    assert curve.counts.tolist() == [1, 1, 3, 3]


def test_a_bound_holds_for_smaller_budgets_too():
    curve = frontier(np.array([3.0, 2.0, 1.0]), np.array([1, 1, 1]), [1, 2, 3], Fickle())
    assert curve.bounds.tolist() == [3, 6, 6]


def test_counts_and_costs_are_those_of_the_subset():
    curve = frontier(np.array([3.0, 2.0, 1.0]), np.array([2, 2, 2]), [4, 1, 100, 4])
    assert curve.budgets.tolist() == [1, 4, 100]
    assert curve.values.tolist() == [0.0, 5.0, 6.0]
    assert curve.costs.tolist() == [0, 4, 6]
    assert curve.counts.tolist() == [0, 2, 3]
    assert curve.gaps.tolist() == [0.0, 0.0, 0.0]


def test_no_budgets_give_an_empty_curve():
    curve = frontier(np.ones(2), np.array([1, 1]), [])
    assert isinstance(curve, Frontier)
    assert curve.values.shape == curve.gaps.shape == (0,)


def test_an_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="budget: -1; give 0 or more"):
        frontier(np.ones(2), np.array([1, 1]), [3, -1])

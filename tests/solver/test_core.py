"""The core method at sizes too large for brute force, and the guarantee of a relative gap."""

from __future__ import annotations

import numpy as np
import pytest

from solver import CoreKnapsack, Greedy, KnapsackProblem, Status
from tests.oracles.knapsack import KINDS, TOLERANCE, check_certificate, random_problem


def exact_by_dynamic_programming(problem: KnapsackProblem) -> float:
    """Return the optimum in O(N · budget)."""
    best = np.zeros(problem.budget + 1)
    for value, cost in zip(problem.values, problem.costs, strict=True):
        if 0 < cost <= problem.budget and value > 0:
            best[cost:] = np.maximum(best[cost:], best[:-cost] + value)
    return float(best[-1])


@pytest.mark.parametrize("core_size", [1, 8, 64, 4096])
@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_whatever_the_core_leaves_out(core_size: int, seed: int):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 100, 300)
    problem = KnapsackProblem(costs * rng.lognormal(0, 0.3, 300), costs, int(costs.sum() * rng.uniform(0.05, 0.9)))
    solution = CoreKnapsack(core_size=core_size).solve(problem)
    optimum = exact_by_dynamic_programming(problem)

    check_certificate(problem, solution)
    assert solution.value <= optimum * (1 + TOLERANCE)
    assert optimum <= solution.bound * (1 + TOLERANCE)
    if core_size == 4096:
        assert solution.status is Status.OPTIMAL


def test_what_branch_and_bound_does_not_finish_is_proven_all_the_same():
    # Value = cost + 100: the hard case of the literature, on which OR-Tools' branch and bound runs out of time.
    costs = np.random.default_rng(0).integers(1, 1001, 300)
    problem = KnapsackProblem(costs + 100.0, costs, int(costs.sum() // 10))
    solution = CoreKnapsack().solve(problem)
    assert solution.status is Status.OPTIMAL
    assert solution.value == pytest.approx(exact_by_dynamic_programming(problem), rel=TOLERANCE)


@pytest.mark.parametrize("seed", [0, 7, 10])
def test_what_the_core_leaves_out_fills_the_room_it_leaves(seed: int):
    problem = random_problem(seed, num_items=200, kind="giant")
    solution = CoreKnapsack(core_size=4).solve(problem)
    left = problem.eligible()[~solution.chosen[problem.eligible()]]
    assert (problem.costs[left] > problem.budget - solution.cost).all()
    # Only a core with a filled budget is better here.
    assert solution.value > Greedy().solve(problem).value


def test_ties_go_to_the_first():
    values = np.random.default_rng(0).integers(1, 4, 1000).astype(np.float64)
    solution = CoreKnapsack().solve(KnapsackProblem(values, np.full(1000, 7), 7 * 500 + 5))
    best = sorted(range(1000), key=lambda item: (-values[item], item))[:500]
    assert np.flatnonzero(solution.chosen).tolist() == sorted(best)
    assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_greedy(kind: str):
    problem = random_problem(11, num_items=2000, kind=kind)
    greedy = Greedy().solve(problem)
    core = CoreKnapsack(core_size=64, time_limit=0.2).solve(problem)
    assert core.value >= greedy.value
    assert core.bound <= greedy.bound * (1 + TOLERANCE)


def test_a_mixed_hundred_thousand_is_nearly_proven():
    rng = np.random.default_rng(0)
    costs = rng.choice([1, 384, 1536, 147456], 100_000)
    problem = KnapsackProblem(rng.lognormal(0, 2, 100_000), costs, int(costs.sum() // 10))
    solution = CoreKnapsack(relative_gap=1e-6).solve(problem)
    check_certificate(problem, solution)
    assert solution.gap < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_within_the_gap_rounding_of_the_values_changes_no_choice(seed: int):
    rng = np.random.default_rng(seed)
    costs = rng.choice([1, 384, 1536, 147456], 20_000)
    values = np.sqrt(costs) * rng.lognormal(0, 1, 20_000)
    budget = int(costs.sum() // 20)
    rounded = values * (1 + 1e-7 * rng.uniform(-1, 1, 20_000))

    solver = CoreKnapsack(relative_gap=1e-4)
    before = solver.solve(KnapsackProblem(values, costs, budget))
    after = solver.solve(KnapsackProblem(rounded, costs, budget))
    assert before.status is after.status is Status.WITHIN_GAP
    np.testing.assert_array_equal(after.chosen, before.chosen)
    np.testing.assert_array_equal(before.chosen, Greedy().solve(KnapsackProblem(values, costs, budget)).chosen)


def test_a_gap_that_greedy_misses_is_searched_for():
    # Greedy takes the dense small item, which keeps the large one out.
    problem = KnapsackProblem(np.array([2.0, 10.0]), np.array([1, 10]), 10)
    assert Greedy().solve(problem).value == 2
    assert CoreKnapsack(relative_gap=1e-4).solve(problem).value == 10


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"core_size": 0}, "core_size: 0; give at least 1"),
        ({"relative_gap": -0.1}, r"relative_gap: -0\.1; give a fraction"),
        ({"relative_gap": 1.0}, r"relative_gap: 1\.0; give a fraction"),
        ({"time_limit": 0.0}, r"time_limit: 0\.0; give a number of seconds"),
    ],
)
def test_impossible_settings_are_refused(setting: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CoreKnapsack(**setting)

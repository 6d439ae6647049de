"""Properties of every solver, checked against brute force and the problem, never against another solver."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from solver import BranchAndBound, CoreKnapsack, CpSat, Greedy, KnapsackProblem, Solver, Status
from tests.oracles.knapsack import KINDS, TOLERANCE, brute_force, check_certificate, random_problem

EXACT = [CoreKnapsack(), BranchAndBound(), CpSat()]
SOLVERS = [*EXACT, Greedy(), CoreKnapsack(core_size=1), CoreKnapsack(relative_gap=0.05)]

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
exact_solver = pytest.mark.parametrize("solver", EXACT, ids=repr)
every_kind = pytest.mark.parametrize("kind", KINDS)


def problem_of(values: list[float], costs: list[int], budget: int) -> KnapsackProblem:
    return KnapsackProblem(np.array(values, dtype=np.float64), np.array(costs, dtype=np.int64), budget)


@every_solver
@every_kind
@pytest.mark.parametrize("seed", range(5))
def test_certificate_holds_against_brute_force(solver: Solver, kind: str, seed: int):
    problem = random_problem(seed, num_items=12, kind=kind)
    solution = solver.solve(problem)
    optimum = brute_force(problem)

    check_certificate(problem, solution)
    assert solution.value <= optimum * (1 + TOLERANCE)
    assert optimum <= solution.bound * (1 + TOLERANCE)


@exact_solver
@every_kind
@pytest.mark.parametrize("seed", range(5))
def test_exact_solvers_find_and_prove_the_optimum(solver: Solver, kind: str, seed: int):
    problem = random_problem(seed, num_items=12, kind=kind)
    solution = solver.solve(problem)

    assert solution.status is Status.OPTIMAL
    assert solution.value == pytest.approx(brute_force(problem), rel=TOLERANCE)


@given(
    items=st.lists(st.tuples(st.floats(-1, 1e6), st.integers(1, 30)), max_size=9),
    budget=st.integers(0, 120),
)
@settings(max_examples=150, deadline=None)
def test_core_on_generated_problems(items: list[tuple[float, int]], budget: int):
    values, costs = [value for value, _ in items], [cost for _, cost in items]
    assume(not 0 < max(values, default=0) < 1e-250)
    problem = problem_of(values, costs, budget)
    solution = CoreKnapsack().solve(problem)

    check_certificate(problem, solution)
    assert solution.status is Status.OPTIMAL
    assert solution.value == pytest.approx(brute_force(problem), rel=TOLERANCE)


@every_solver
@every_kind
def test_same_answer_twice(solver: Solver, kind: str):
    problem = random_problem(7, num_items=40, kind=kind)
    np.testing.assert_array_equal(solver.solve(problem).chosen, solver.solve(problem).chosen)


@exact_solver
@every_kind
def test_the_order_of_the_items_changes_no_value(solver: Solver, kind: str):
    problem = random_problem(3, num_items=40, kind=kind)
    order = np.random.default_rng(0).permutation(40)
    shuffled = KnapsackProblem(problem.values[order], problem.costs[order], problem.budget)
    assert solver.solve(shuffled).value == pytest.approx(solver.solve(problem).value, rel=TOLERANCE)


@every_solver
@pytest.mark.parametrize("kind", ["layers", "mixed", "giant"])
@pytest.mark.parametrize("scale", [1e-30, 1e12])
def test_the_unit_of_the_values_changes_nothing(solver: Solver, kind: str, scale: float):
    problem = random_problem(4, num_items=40, kind=kind)
    before = solver.solve(problem)
    after = solver.solve(KnapsackProblem(problem.values * scale, problem.costs, problem.budget))

    np.testing.assert_array_equal(after.chosen, before.chosen)
    assert after.bound == pytest.approx(before.bound * scale, rel=1e-9)
    assert after.status is before.status


@every_solver
def test_the_unit_of_the_costs_changes_nothing(solver: Solver):
    problem = random_problem(4, num_items=40, kind="mixed")
    bytes_ = KnapsackProblem(problem.values, problem.costs * 4, problem.budget * 4 + 3)
    before, after = solver.solve(problem), solver.solve(bytes_)
    np.testing.assert_array_equal(after.chosen, before.chosen)
    assert after.bound == before.bound


@every_solver
@pytest.mark.parametrize(
    ("values", "costs", "budget", "chosen"),
    [
        pytest.param([], [], 10, [], id="no items"),
        pytest.param([1, 2], [1, 1], 0, [0, 0], id="no budget"),
        pytest.param([0, -1], [1, 1], 10, [0, 0], id="nothing worth having"),
        pytest.param([9, 8], [11, 12], 10, [0, 0], id="nothing affordable"),
        pytest.param([1, 2, -3], [4, 6, 1], 10, [1, 1, 0], id="all that is worth having fits"),
        pytest.param([1, 2], [1, 1], 2**80, [1, 1], id="budget beyond int64"),
        pytest.param([1, 1, 1, 1], [5, 5, 5, 5], 12, [1, 1, 0, 0], id="ties go to the first"),
        pytest.param([1e9, 2, 1], [11, 5, 5], 10, [0, 1, 1], id="item beyond the budget loosens no bound"),
        pytest.param([1, 2, 3], [2**60, 2**60, 2**60], 2**61, [0, 1, 1], id="huge costs"),
        pytest.param([3, 5e-324], [2, 1], 3, [1, 1], id="a denormal value"),
    ],
)
def test_edges_are_solved_and_proven(solver, values, costs, budget, chosen):
    problem = problem_of(values, costs, budget)
    solution = solver.solve(problem)

    check_certificate(problem, solution)
    # A search may break ties differently.
    assert solution.value == pytest.approx(problem.values[np.array(chosen, dtype=bool)].sum())
    assert solution.status is Status.OPTIMAL
    if isinstance(solver, Greedy | CoreKnapsack):
        assert solution.chosen.tolist() == [bool(taken) for taken in chosen]


@pytest.mark.parametrize(
    "solver", [CoreKnapsack(time_limit=1e-3), BranchAndBound(time_limit=1e-3), CpSat(time_limit=1e-3)], ids=repr
)
def test_out_of_time_is_said_and_still_certified(solver: Solver):
    # All densities are similar and no subset costs exactly the budget, so nothing can be pruned.
    rng = np.random.default_rng(0)
    costs = rng.integers(10**5, 10**6, 400) * 3 + 1
    problem = KnapsackProblem(costs + 1e5, costs, int(costs.sum() // 2))
    solution = solver.solve(problem)

    check_certificate(problem, solution)
    assert solution.status is Status.FEASIBLE
    assert solution.seconds < 5


@pytest.mark.parametrize("status", Status)
def test_every_status_says_what_to_do(status: Status):
    assert status.advice.endswith(".")

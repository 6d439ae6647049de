"""Properties of every multiple-choice solver, checked against brute force and the problem."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from solver import (
    CoreKnapsack,
    Greedy,
    MultipleChoiceCore,
    MultipleChoiceCpSat,
    MultipleChoiceGreedy,
    MultipleChoiceProblem,
    MultipleChoiceSolver,
    Status,
)
from tests.oracles import knapsack as knapsack_oracle
from tests.oracles.knapsack import TOLERANCE
from tests.oracles.multiple_choice import KINDS, brute_force, check_choice, random_choice

EXACT = [MultipleChoiceCore(), MultipleChoiceCpSat()]
SOLVERS = [*EXACT, MultipleChoiceGreedy(), MultipleChoiceCore(core_size=2), MultipleChoiceCore(relative_gap=0.05)]
# Numbers of classes, options per class, and members per class, which is also the number of free items.
SHAPES = [(2, 2, 3), (3, 3, 1), (4, 3, 0), (1, 4, 4)]

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
exact_solver = pytest.mark.parametrize("solver", EXACT, ids=repr)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_solver
@every_kind
def test_certificates_hold_against_brute_force(solver: MultipleChoiceSolver, kind: str):
    for seed, shape in enumerate(SHAPES):
        problem = random_choice(seed, kind, *shape)
        solution = solver.solve(problem)
        optimum = brute_force(problem)

        check_choice(problem, solution)
        assert solution.value <= optimum * (1 + TOLERANCE)
        assert optimum <= solution.bound * (1 + TOLERANCE)
        if solver in EXACT:
            assert solution.status is Status.OPTIMAL
            assert solution.value == pytest.approx(optimum, rel=TOLERANCE)


@given(
    items=st.lists(
        st.tuples(st.floats(-1, 1e6), st.integers(1, 30), st.sampled_from([0, 0, 3, 3, -1]), st.booleans()), max_size=9
    ),
    budget=st.integers(0, 120),
)
@settings(max_examples=100, deadline=None)
def test_core_on_generated_problems(items: list[tuple[float, int, int, bool]], budget: int):
    assume(not 0 < max((value for value, *_ in items), default=0) < 1e-250)
    problem = MultipleChoiceProblem(
        np.array([value for value, *_ in items], dtype=np.float64),
        np.array([cost for _, cost, _, _ in items], dtype=np.int64),
        budget,
        np.array([name for _, _, name, _ in items], dtype=np.int64),
        np.array([exclusive and name >= 0 for *_, name, exclusive in items], dtype=bool),
    )
    solution = MultipleChoiceCore().solve(problem)

    check_choice(problem, solution)
    assert solution.status is Status.OPTIMAL
    assert solution.value == pytest.approx(brute_force(problem), rel=TOLERANCE)


@pytest.mark.parametrize("kind", knapsack_oracle.KINDS)
@pytest.mark.parametrize("in_classes", [False, True])
def test_with_no_options_it_is_the_knapsack(kind: str, in_classes: bool):
    knapsack = knapsack_oracle.random_problem(5, num_items=60, kind=kind)
    classes = np.arange(60) % 7 if in_classes else np.full(60, -1)
    problem = MultipleChoiceProblem(knapsack.values, knapsack.costs, knapsack.budget, classes, np.zeros(60, dtype=bool))

    greedy, expected = MultipleChoiceGreedy().solve(problem), Greedy().solve(knapsack)
    np.testing.assert_array_equal(greedy.chosen, expected.chosen)
    assert greedy.bound == pytest.approx(expected.bound, rel=TOLERANCE)
    core, expected = MultipleChoiceCore().solve(problem), CoreKnapsack().solve(knapsack)
    assert core.status is expected.status is Status.OPTIMAL
    assert core.value == pytest.approx(expected.value, rel=TOLERANCE)


@pytest.mark.parametrize("kind", knapsack_oracle.KINDS)
def test_options_alone_in_their_classes_are_items_of_the_knapsack(kind: str):
    knapsack = knapsack_oracle.random_problem(6, num_items=40, kind=kind)
    problem = MultipleChoiceProblem(
        knapsack.values, knapsack.costs, knapsack.budget, np.arange(40), np.ones(40, dtype=bool)
    )
    assert MultipleChoiceCore().solve(problem).value == pytest.approx(CoreKnapsack().solve(knapsack).value)


@every_solver
@every_kind
def test_same_answer_twice(solver: MultipleChoiceSolver, kind: str):
    problem = random_choice(7, kind, num_classes=6, num_options=4, num_members=6)
    np.testing.assert_array_equal(solver.solve(problem).chosen, solver.solve(problem).chosen)


@exact_solver
@every_kind
def test_neither_order_nor_names_nor_units_change_the_value(solver: MultipleChoiceSolver, kind: str):
    problem = random_choice(3, kind, num_classes=6, num_options=4, num_members=6)
    order = np.random.default_rng(0).permutation(problem.num_items)
    names = np.where(problem.classes < 0, -1, 10**12 - problem.classes)
    other = MultipleChoiceProblem(
        problem.values[order] * 1e-30,
        problem.costs[order] * 4,
        problem.budget * 4 + 3,
        names[order],
        problem.exclusive[order],
    )
    before, after = solver.solve(problem), solver.solve(other)
    assert after.value == pytest.approx(before.value * 1e-30, rel=TOLERANCE)
    assert after.status is before.status is Status.OPTIMAL


@every_solver
@pytest.mark.parametrize(
    ("values", "costs", "classes", "exclusive", "budget", "chosen"),
    [
        pytest.param([], [], [], [], 10, [], id="no items"),
        pytest.param([1, 2], [1, 1], [0, 0], [1, 1], 0, [0, 0], id="no budget"),
        pytest.param([0, -1], [1, 1], [0, 0], [1, 0], 10, [0, 0], id="nothing worth having"),
        pytest.param([9, 8], [11, 12], [0, 0], [1, 0], 10, [0, 0], id="nothing affordable"),
        pytest.param([9, 8, 2], [11, 3, 3], [0, 0, 0], [1, 1, 0], 10, [0, 1, 0], id="an option beyond the budget"),
        pytest.param([3, 2, 2], [9, 3, 3], [0, 0, 0], [1, 0, 0], 99, [0, 1, 1], id="members beat the option"),
        pytest.param([5, 2, 2], [9, 3, 3], [0, 0, 0], [1, 0, 0], 99, [1, 0, 0], id="the option beats the members"),
        pytest.param([5, 2, 2], [9, 3, 3], [0, 0, 0], [1, 0, 0], 8, [0, 1, 1], id="the option does not fit"),
        pytest.param([1, 2, 4], [1, 1, 1], [0, 0, -1], [1, 1, 0], 2**80, [0, 1, 1], id="budget beyond int64"),
        pytest.param([5, 5], [7, 3], [0, 0], [1, 1], 99, [0, 1], id="the cheaper of equal values"),
        pytest.param([1, 2, 3], [2**60, 2**60, 2**60], [0, 0, 1], [1, 1, 1], 2**61, [0, 1, 1], id="huge costs"),
        pytest.param([3, 5e-324], [2, 1], [0, 1], [1, 1], 3, [1, 1], id="a denormal value"),
    ],
)
def test_edges_are_solved_and_proven(solver, values, costs, classes, exclusive, budget, chosen):
    problem = MultipleChoiceProblem(
        np.array(values, dtype=np.float64),
        np.array(costs, dtype=np.int64),
        budget,
        np.array(classes, dtype=np.int64),
        np.array(exclusive, dtype=bool),
    )
    solution = solver.solve(problem)

    check_choice(problem, solution)
    assert solution.value == pytest.approx(problem.values[np.array(chosen, dtype=bool)].sum())
    assert solution.status is Status.OPTIMAL
    if not isinstance(solver, MultipleChoiceCpSat):
        assert solution.chosen.tolist() == [bool(taken) for taken in chosen]

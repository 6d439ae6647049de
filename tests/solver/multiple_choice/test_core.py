"""The core method and its relaxation at sizes too large for brute force, against SciPy's HiGHS."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from solver import MultipleChoiceCore, MultipleChoiceCpSat, MultipleChoiceGreedy, MultipleChoiceProblem, Status
from solver.multiple_choice.greedy import fill
from solver.multiple_choice.relaxation import MEMBERS, Candidates, ChoiceRelaxation
from tests.oracles.knapsack import TOLERANCE
from tests.oracles.multiple_choice import KINDS, brute_force, check_choice, programmed, random_choice

# Tolerances of HiGHS: 1e-9 absolute on rows and 1e-7 on duals.
PROGRAM_TOLERANCE = 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(30, 5, 12), (40, 6, 0), (3, 2, 100)])
def test_the_bound_is_that_of_the_linear_relaxation(kind: str, shape: tuple[int, int, int]):
    problem = random_choice(0, kind, *shape)
    assert ChoiceRelaxation.of(problem).bound == pytest.approx(programmed(problem, whole=False), rel=PROGRAM_TOLERANCE)


@pytest.mark.parametrize("kind", ["layers", "mixed", "equal costs", "ties"])
@pytest.mark.parametrize("shape", [(25, 5, 8), (40, 6, 0)])
def test_the_optimum_is_that_of_the_integer_program(kind: str, shape: tuple[int, int, int]):
    problem = random_choice(1, kind, *shape)
    solution = MultipleChoiceCore(core_size=10_000).solve(problem)
    check_choice(problem, solution)
    assert solution.status is Status.OPTIMAL
    assert solution.value == pytest.approx(programmed(problem, whole=True), rel=PROGRAM_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_deciding_against_the_relaxation_costs_the_penalty(kind: str):
    problem = random_choice(2, kind, num_classes=2, num_options=2, num_members=3)
    relaxation = ChoiceRelaxation.of(problem)
    candidates = relaxation.candidates
    # So large that every optimal choice takes these items.
    bonus = 1e6

    def optimum(take: list[int], leave: list[int]) -> float:
        """Return the optimum over choices that take the items ``take`` and leave the items ``leave``."""
        values = problem.values.copy()
        values[take] += bonus
        values[leave] = 0
        return brute_force(replace(problem, values=values)) - bonus * len(take)

    def cannot_exceed(penalty: float) -> float:
        return (relaxation.bound - penalty) * (1 + TOLERANCE) + bonus * TOLERANCE

    options_of = [candidates.options[candidates.option_classes == of].tolist() for of in range(candidates.num_classes)]
    for of, penalty in enumerate(relaxation.mode_penalties):
        assert optimum(take=[], leave=options_of[of]) <= cannot_exceed(penalty)
    for option, penalty in zip(candidates.options, relaxation.option_penalties, strict=True):
        assert optimum(take=[option], leave=[]) <= cannot_exceed(penalty)
    for member, penalty in enumerate(relaxation.member_penalties):
        item = candidates.members[member]
        if relaxation.taken[member]:
            others = options_of[candidates.member_classes[member]]
            assert optimum(take=[], leave=[item, *others]) <= cannot_exceed(penalty)
        else:
            assert optimum(take=[item], leave=[]) <= cannot_exceed(penalty)


@pytest.mark.parametrize("core_size", [1, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_whatever_the_core_leaves_out(core_size: int, kind: str):
    problem = random_choice(4, kind, num_classes=30, num_options=4, num_members=5)
    solution = MultipleChoiceCore(core_size=core_size).solve(problem)
    check_choice(problem, solution)
    optimum = programmed(problem, whole=True)
    assert solution.value <= optimum * (1 + PROGRAM_TOLERANCE)
    assert optimum <= solution.bound * (1 + PROGRAM_TOLERANCE)
    assert solution.value >= MultipleChoiceGreedy().solve(problem).value


@pytest.mark.parametrize(
    ("kind", "seed", "shape"), [("layers", 27, (3, 2, 3)), ("mixed", 26, (2, 3, 12)), ("mixed", 75, (8, 1, 4))]
)
def test_a_class_may_go_to_nothing_where_the_relaxation_has_members(kind: str, seed: int, shape: tuple[int, int, int]):
    # In each problem the core drops members outside it and spends their budget on other items.
    problem = random_choice(seed, kind, *shape)
    solution = MultipleChoiceCore(core_size=4).solve(problem)
    check_choice(problem, solution)
    assert solution.value <= programmed(problem, whole=True) * (1 + PROGRAM_TOLERANCE)


def test_filling_puts_an_option_in_the_place_of_its_class_and_spends_nothing_on_its_members():
    problem = MultipleChoiceProblem(
        np.array([0.5, 10.0, 0.6]), np.array([1, 10, 2]), 12, np.array([0, 0, -1]), np.array([False, True, False])
    )
    candidates = Candidates.of(problem)
    modes, taken = fill(candidates, np.full(2, MEMBERS), np.zeros(2, dtype=bool))
    assert candidates.mask(modes, taken, 3).tolist() == [False, True, True]


def test_a_gap_that_greedy_misses_is_searched_for():
    # Greedy takes the dense cheap option of one class, after which the best option of the other does not fit.
    problem = MultipleChoiceProblem(
        np.array([2.0, 10.0]), np.array([1, 10]), 10, np.array([0, 1]), np.ones(2, dtype=bool)
    )
    assert MultipleChoiceGreedy().solve(problem).value == 2
    assert MultipleChoiceCore(relative_gap=1e-4).solve(problem).value == 10


@pytest.mark.parametrize(
    "solver", [MultipleChoiceCore(work_limit=1e-3), MultipleChoiceCpSat(work_limit=1e-3)], ids=repr
)
def test_out_of_work_is_said_certified_and_the_same_each_time(solver: MultipleChoiceCore | MultipleChoiceCpSat):
    problem = _hard(num_classes=60)
    solution = solver.solve(problem)
    check_choice(problem, solution)
    assert solution.status is Status.FEASIBLE
    np.testing.assert_array_equal(solver.solve(problem).chosen, solution.chosen)


def _hard(num_classes: int) -> MultipleChoiceProblem:
    """All densities are similar and no choice costs exactly the budget, so nothing can be pruned."""
    rng = np.random.default_rng(0)
    costs = rng.integers(10**5, 10**6, num_classes * 4) * 3 + 1
    classes = np.repeat(np.arange(num_classes), 4)
    return MultipleChoiceProblem(costs + 1e5, costs, int(costs.sum() // 7) * 3, classes, np.arange(costs.size) % 4 < 2)


def test_five_thousand_classes_with_members_are_nearly_proven():
    problem = random_choice(0, "layers", num_classes=5_000, num_options=6, num_members=20)
    solution = MultipleChoiceCore(relative_gap=1e-6).solve(problem)
    check_choice(problem, solution)
    assert solution.gap <= 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_within_the_gap_rounding_of_the_values_changes_no_choice(seed: int):
    problem = random_choice(seed, "mixed", num_classes=300, num_options=6, num_members=40)
    noise = np.random.default_rng(seed).uniform(-1, 1, problem.num_items)
    rounded = MultipleChoiceProblem(
        problem.values * (1 + 1e-9 * noise), problem.costs, problem.budget, problem.classes, problem.exclusive
    )
    solver = MultipleChoiceCore(relative_gap=1e-3)
    before, after = solver.solve(problem), solver.solve(rounded)
    assert before.status is after.status is Status.WITHIN_GAP
    np.testing.assert_array_equal(after.chosen, before.chosen)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"core_size": 0}, "core_size: 0; give at least 1"),
        ({"relative_gap": -0.1}, r"relative_gap: -0\.1; give a fraction"),
        ({"relative_gap": 1.0}, r"relative_gap: 1\.0; give a fraction"),
        ({"work_limit": 0.0}, r"work_limit: 0\.0; give a number above 0"),
    ],
)
def test_impossible_settings_are_refused(setting: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MultipleChoiceCore(**setting)

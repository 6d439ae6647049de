"""Optima and properties of multiple-choice problems, computed without our solvers."""

from __future__ import annotations

import numpy as np
from scipy import optimize, sparse

from solver import MultipleChoiceProblem, Solution
from tests.oracles.knapsack import check_certificate


def brute_force(problem: MultipleChoiceProblem) -> float:
    """Return the optimum over all 2^N subsets that satisfy the constraints."""
    bits = (np.arange(2**problem.num_items)[:, None] >> np.arange(problem.num_items) & 1).astype(bool)
    permitted = bits @ problem.costs <= problem.budget
    for option in np.flatnonzero(problem.exclusive):
        others = problem.classes == problem.classes[option]
        others[option] = False
        permitted &= ~(bits[:, option] & bits[:, others].any(axis=1))
    return float((bits @ problem.values)[permitted].max())


def programmed(problem: MultipleChoiceProblem, whole: bool) -> float:
    """Return the optimum of the integer program (``whole``) or of its linear relaxation, by SciPy's HiGHS."""
    rows, columns = [], []
    num_rows = 0
    for name in np.unique(problem.classes[problem.exclusive]):
        options = np.flatnonzero((problem.classes == name) & problem.exclusive)
        members = np.flatnonzero((problem.classes == name) & ~problem.exclusive)
        for others in [[member] for member in members] or [[]]:
            group = [*options, *others]
            rows += [num_rows] * len(group)
            columns += group
            num_rows += 1
    # A budget that no choice can spend would loosen only the linear relaxation.
    spendable = problem.budget - problem.budget % max(1, int(np.gcd.reduce(problem.costs[problem.eligible()])))
    shape = (num_rows, problem.num_items)
    choice = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
    answer = optimize.milp(
        -np.maximum(problem.values, 0),
        integrality=np.full(problem.num_items, int(whole)),
        bounds=(0, np.where(problem.costs <= problem.budget, 1, 0)),
        constraints=[
            optimize.LinearConstraint(choice, ub=1),
            optimize.LinearConstraint(problem.costs[None].astype(float), ub=spendable),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert answer.success
    return -float(answer.fun)


def check_choice(problem: MultipleChoiceProblem, solution: Solution) -> None:
    """Check all properties of a solution that follow from the problem alone."""
    check_certificate(problem, solution)
    for name in set(problem.classes[problem.exclusive & solution.chosen].tolist()):
        assert solution.chosen[problem.classes == name].sum() == 1


def random_choice(seed: int, kind: str, num_classes: int, num_options: int, num_members: int) -> MultipleChoiceProblem:
    """Return a shuffled problem of one of the `KINDS`: classes of options and members, and free items."""
    rng = np.random.default_rng(seed)
    size = num_options + num_members
    classes = np.append(np.repeat(np.arange(num_classes) * 7, size), np.full(num_members, -1))
    exclusive = np.append(np.tile(np.arange(size) < num_options, num_classes), np.zeros(num_members, dtype=bool))
    values, costs = KINDS[kind](rng, exclusive, num_members)
    values = np.where(rng.random(classes.size) < 0.1, -values, values)
    order = rng.permutation(classes.size)
    # An average option for only some of the classes, so that the budget binds.
    budget = int(num_classes * costs[exclusive].mean() * rng.uniform(0.05, 0.9))
    return MultipleChoiceProblem(values[order], costs[order], budget, classes[order], exclusive[order])


def _layers(rng: np.random.Generator, exclusive: np.ndarray, num_members: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 384 elements, and low-rank options of matrices."""
    ranks = 768 * 2 ** rng.integers(0, 6, exclusive.size)
    costs = np.where(exclusive, ranks, 384)
    return costs**0.7 * rng.lognormal(0, 0.7, exclusive.size), costs


def _mixed(rng: np.random.Generator, exclusive: np.ndarray, num_members: int) -> tuple[np.ndarray, np.ndarray]:
    size = np.where(exclusive, max(1, num_members), 1)
    return rng.random(exclusive.size) * size, rng.integers(1, 100, exclusive.size) * size


def _equal_costs(rng: np.random.Generator, exclusive: np.ndarray, num_members: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.random(exclusive.size) * np.where(exclusive, 2, 1), np.full(exclusive.size, 12)


def _equal_densities(
    rng: np.random.Generator, exclusive: np.ndarray, num_members: int
) -> tuple[np.ndarray, np.ndarray]:
    costs = rng.integers(1, 50, exclusive.size)
    return costs * 0.3, costs


def _ties(rng: np.random.Generator, exclusive: np.ndarray, num_members: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 4, exclusive.size).astype(np.float64), rng.integers(1, 4, exclusive.size)


KINDS = {
    "layers": _layers,
    "mixed": _mixed,
    "equal costs": _equal_costs,
    "equal densities": _equal_densities,
    "ties": _ties,
}

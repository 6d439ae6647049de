"""Optima and properties of knapsacks, computed without a solver."""

from __future__ import annotations

import numpy as np

from solver import KnapsackProblem, Solution, Status

# Relative error of sums of a few float64 numbers in different orders.
TOLERANCE = 1e-11


def brute_force(problem: KnapsackProblem) -> float:
    """Return the optimum over all 2^N subsets."""
    bits = np.arange(2**problem.num_items)[:, None] >> np.arange(problem.num_items) & 1
    fits = bits @ problem.costs <= problem.budget
    return float((bits @ problem.values)[fits].max())


def check_certificate(problem: KnapsackProblem, solution: Solution) -> None:
    """Check all properties of a solution that follow from the problem alone."""
    chosen = solution.chosen
    assert chosen.dtype == bool
    assert chosen.shape == (problem.num_items,)
    assert (problem.values[chosen] > 0).all()
    assert solution.cost == sum(problem.costs[chosen].tolist()) <= problem.budget
    assert solution.value == float(problem.values[chosen].sum())
    assert solution.value <= solution.bound
    assert solution.gap == (0 if solution.bound == 0 else (solution.bound - solution.value) / solution.bound)
    assert (solution.status is Status.OPTIMAL) == (solution.gap == 0)
    assert solution.seconds >= 0


def random_problem(seed: int, num_items: int, kind: str) -> KnapsackProblem:
    """Return a problem of one of the `KINDS`, with some worthless items and a budget for a part of the others."""
    rng = np.random.default_rng(seed)
    costs, values = KINDS[kind](rng, num_items)
    values = np.where(rng.random(num_items) < 0.1, -values, values)
    return KnapsackProblem(values, costs, int(costs.sum() * rng.uniform(0, 1.1)))


def _layers(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    costs = rng.choice([1, 384, 1536, 147456], num_items)
    return costs, np.sqrt(costs) * rng.lognormal(0, 1, num_items)


def _mixed(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(1, 1000, num_items), rng.random(num_items)


def _equal_costs(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(num_items, 384), rng.random(num_items)


def _equal_densities(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    costs = rng.integers(1, 50, num_items)
    return costs, costs * 0.3


def _giant(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    costs, values = _mixed(rng, num_items)
    costs[0], values[0] = 40_000, 1e6
    return costs, values


KINDS = {
    "layers": _layers,
    "mixed": _mixed,
    "equal costs": _equal_costs,
    "equal densities": _equal_densities,
    "giant": _giant,
}

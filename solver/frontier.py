"""The frontier: the best value as a function of the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from solver.core import CoreKnapsack
from solver.multiple_choice.core import MultipleChoiceCore
from solver.multiple_choice.problem import MultipleChoiceProblem, MultipleChoiceSolver
from solver.problem import KnapsackProblem
from solver.solution import Solution, Solver

# A gap of 1e-4 is not visible in a plot, and greedy usually reaches it without a search.
CURVE_SOLVER = CoreKnapsack(relative_gap=1e-4)
CHOICE_CURVE_SOLVER = MultipleChoiceCore(relative_gap=1e-4)


@dataclass(frozen=True)
class Frontier:
    """Solutions for ascending budgets. Values and bounds never decrease.

    Attributes:
        budgets: Budgets. int64 ``[B]``.
        values: Value of the subset found for each budget. float64 ``[B]``.
        bounds: Upper bound on the value of any subset within each budget. float64 ``[B]``.
        costs: Cost of the subset found, at most the budget. int64 ``[B]``.
        counts: Number of items in the subset found. int64 ``[B]``.
    """

    budgets: np.ndarray
    values: np.ndarray
    bounds: np.ndarray
    costs: np.ndarray
    counts: np.ndarray

    @property
    def gaps(self) -> np.ndarray:
        """``(bound - value) / bound`` at each budget, 0 where the bound is 0. float64 ``[B]``."""
        return np.divide(self.bounds - self.values, self.bounds, out=np.zeros_like(self.bounds), where=self.bounds > 0)


def frontier(values: np.ndarray, costs: np.ndarray, budgets: Sequence[int], solver: Solver = CURVE_SOLVER) -> Frontier:
    """Solve the knapsack for each budget.

    Args:
        values: Value of each item. float64 ``[N]``.
        costs: Cost of each item. int64 ``[N]``.
        budgets: Budgets in any order; duplicates are dropped.
        solver: Solver of each problem.

    Raises:
        ValueError: If a value, cost or budget cannot be part of a `KnapsackProblem`.
    """
    return _trace(budgets, lambda budget: solver.solve(KnapsackProblem(values, costs, budget)))


def choice_frontier(
    problem: MultipleChoiceProblem, budgets: Sequence[int], solver: MultipleChoiceSolver = CHOICE_CURVE_SOLVER
) -> Frontier:
    """Solve a multiple-choice problem for each budget instead of its own.

    Args:
        problem: Items and their classes.
        budgets: Budgets in any order; duplicates are dropped.
        solver: Solver of each problem.

    Raises:
        ValueError: If a budget cannot be part of a `MultipleChoiceProblem`.
    """
    return _trace(budgets, lambda budget: solver.solve(replace(problem, budget=budget)))


def _trace(budgets: Sequence[int], solve: Callable[[int], Solution]) -> Frontier:
    """Return the frontier of the solutions that ``solve`` finds for each budget."""
    ascending = sorted(set(budgets))
    points: list[tuple[float, int, int]] = []
    bounds = []
    for budget in ascending:
        solution = solve(budget)
        bounds.append(solution.bound)
        # A subset that fits a budget fits any larger one, for which a solver that stops early may find a worse subset.
        if points and points[-1][0] >= solution.value:
            points.append(points[-1])
        else:
            points.append((solution.value, solution.cost, int(solution.chosen.sum())))

    best = np.array([value for value, _, _ in points], dtype=np.float64)
    # A bound for a budget is also a bound for any smaller one.
    tightest = np.minimum.accumulate(np.array(bounds, dtype=np.float64)[::-1])[::-1]
    return Frontier(
        budgets=np.array(ascending, dtype=np.int64),
        values=best,
        # Optima are proven up to rounding, so a value carried over from a smaller budget may exceed the bound slightly.
        bounds=np.maximum(best, tightest),
        costs=np.array([cost for _, cost, _ in points], dtype=np.int64),
        counts=np.array([count for _, _, count in points], dtype=np.int64),
    )

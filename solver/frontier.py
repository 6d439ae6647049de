"""The best value against the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from solver.core import CoreKnapsack
from solver.multiple_choice.core import MultipleChoiceCore
from solver.multiple_choice.problem import MultipleChoiceProblem, MultipleChoiceSolver
from solver.problem import KnapsackProblem
from solver.solution import Solution, Solver

# A curve is read by eye: a gap of 1e-4 is not seen, and greedy mostly meets it without a search.
CURVE_SOLVER = CoreKnapsack(relative_gap=1e-4)
CHOICE_CURVE_SOLVER = MultipleChoiceCore(relative_gap=1e-4)


@dataclass(frozen=True)
class Frontier:
    """What each of a range of budgets buys, budgets ascending. Values and bounds never descend.

    Attributes:
        budgets: The budgets. int64 ``[B]``.
        values: What a subset within each budget is worth. float64 ``[B]``.
        bounds: What no subset within each budget exceeds. float64 ``[B]``.
        costs: What that subset costs, at most the budget. int64 ``[B]``.
        counts: How many items it holds. int64 ``[B]``.
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
    """Solve for each budget.

    Args:
        values: What each item is worth. float64 ``[N]``.
        costs: What each item costs. int64 ``[N]``.
        budgets: The budgets, in any order; repeated ones are dropped.
        solver: What solves each problem.

    Raises:
        ValueError: If a value, cost or budget cannot be part of a `KnapsackProblem`.
    """
    return _trace(budgets, lambda budget: solver.solve(KnapsackProblem(values, costs, budget)))


def choice_frontier(
    problem: MultipleChoiceProblem, budgets: Sequence[int], solver: MultipleChoiceSolver = CHOICE_CURVE_SOLVER
) -> Frontier:
    """Solve for each budget in place of the problem's own.

    Args:
        problem: The items and their classes.
        budgets: The budgets, in any order; repeated ones are dropped.
        solver: What solves each problem.

    Raises:
        ValueError: If a budget cannot be part of a `MultipleChoiceProblem`.
    """
    return _trace(budgets, lambda budget: solver.solve(replace(problem, budget=budget)))


def _trace(budgets: Sequence[int], solve: Callable[[int], Solution]) -> Frontier:
    """The curve of what ``solve`` finds for each budget."""
    ascending = sorted(set(budgets))
    points: list[tuple[float, int, int]] = []
    bounds = []
    for budget in ascending:
        solution = solve(budget)
        bounds.append(solution.bound)
        # A subset that fits a budget fits any larger one, where a solver that stops early may do worse.
        if points and points[-1][0] >= solution.value:
            points.append(points[-1])
        else:
            points.append((solution.value, solution.cost, int(solution.chosen.sum())))

    best = np.array([value for value, _, _ in points], dtype=np.float64)
    # What bounds a budget bounds any smaller one.
    tightest = np.minimum.accumulate(np.array(bounds, dtype=np.float64)[::-1])[::-1]
    return Frontier(
        budgets=np.array(ascending, dtype=np.int64),
        values=best,
        # An optimum is proven up to rounding, which a value carried over may exceed it by.
        bounds=np.maximum(best, tightest),
        costs=np.array([cost for _, cost, _ in points], dtype=np.int64),
        counts=np.array([count for _, _, count in points], dtype=np.int64),
    )

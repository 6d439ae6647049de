"""What every solver gives back: a subset, and a certificate of how good it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from solver.problem import KnapsackProblem

# Relative. Sums of up to 10^7 float64 numbers agree to about 1e-14 whatever their order, so two totals closer than this
# are the same total, and a bound raised by this is above the true one.
ROUNDING = 1e-12


class Status(Enum):
    """How much is known about a solution, and what to do about it."""

    OPTIMAL = "optimal"
    WITHIN_GAP = "within_gap"
    FEASIBLE = "feasible"

    @property
    def advice(self) -> str:
        """What the caller can do to get a better solution or a stronger proof."""
        return _ADVICE[self]


_ADVICE = {
    Status.OPTIMAL: "No subset within the budget is worth more. Nothing to do.",
    Status.WITHIN_GAP: (
        "The subset is within `relative_gap` of the bound, where the search was told to stop. "
        "Lower `relative_gap` to search on."
    ),
    Status.FEASIBLE: (
        "The subset is within the budget, but better ones are not ruled out: `gap` says how much better at most. "
        "Raise `time_limit` (or `work_limit`) or `core_size`, or use a core method in place of another solver; "
        "a gap that is small enough for you can be accepted as it is."
    ),
}


@dataclass(frozen=True)
class Solution:
    """A subset of the items, what it is worth, and what no subset can exceed.

    Attributes:
        chosen: True where an item is taken. bool ``[N]``.
        value: Sum of the chosen values.
        cost: Sum of the chosen costs, at most the budget.
        bound: No subset within the budget is worth more than this; equal to ``value`` when that is proven.
        gap: ``(bound - value) / bound``, from 0 (optimal) to 1; 0 when the bound is 0.
        status: How the search ended; ``status.advice`` says what to do about it.
        seconds: Wall-clock time the solver took.
    """

    chosen: np.ndarray
    value: float
    cost: int
    bound: float
    gap: float
    status: Status
    seconds: float


class Solver(Protocol):
    """Anything that solves a knapsack problem. Solvers are values: configured once, used for any problem."""

    def solve(self, problem: KnapsackProblem) -> Solution:
        """Choose items worth as much as possible within the budget."""
        ...


def certify(
    problem: KnapsackProblem, chosen: np.ndarray, bound: float, seconds: float, relative_gap: float = 0.0
) -> Solution:
    """The solution that takes ``chosen`` (bool ``[N]``), given a bound true up to ``ROUNDING``.

    Value and cost are summed afresh from the problem, so nothing a solver believes about its answer gets into it.
    """
    value = float(problem.values[chosen].sum())
    cost = int(problem.costs[chosen].sum())
    assert cost <= problem.budget, f"a solver spent {cost} of a budget of {problem.budget}"

    gap = relative_gap_between(value, bound)
    if gap == 0:
        return Solution(chosen, value, cost, bound=value, gap=0.0, status=Status.OPTIMAL, seconds=seconds)
    status = Status.WITHIN_GAP if gap <= relative_gap else Status.FEASIBLE
    return Solution(chosen, value, cost, bound * (1 + ROUNDING), gap, status, seconds)


def relative_gap_between(value: float, bound: float) -> float:
    """``(bound - value) / bound`` with the bound raised by ``ROUNDING``; 0 where the two are equal but for rounding."""
    if bound <= value * (1 + ROUNDING):
        return 0.0
    bound *= 1 + ROUNDING
    return (bound - value) / bound

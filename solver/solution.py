"""The result of every solver: a subset, and a certificate of its quality."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from solver.problem import KnapsackProblem

# Relative. Sums of up to 10^7 float64 numbers agree to about 1e-14 in any order, so two totals closer than this are
# equal, and a bound raised by this is above the true one.
ROUNDING = 1e-12


class Status(Enum):
    """Proven quality of a solution."""

    OPTIMAL = "optimal"
    WITHIN_GAP = "within_gap"
    FEASIBLE = "feasible"

    @property
    def advice(self) -> str:
        """Advice on how to get a better solution or a stronger proof."""
        return _ADVICE[self]


_ADVICE = {
    Status.OPTIMAL: "No subset within the budget has a higher value. No action is needed.",
    Status.WITHIN_GAP: (
        "The search stopped because the value is within `relative_gap` of the bound. "
        "Lower `relative_gap` to continue the search."
    ),
    Status.FEASIBLE: (
        "The subset is within the budget, but better subsets are possible: `gap` limits how much better. "
        "Raise `time_limit` (or `work_limit`) or `core_size`, or use a core method instead of another solver; "
        "or accept the subset if the gap is small enough."
    ),
}


@dataclass(frozen=True)
class Solution:
    """A subset of the items, its value, and an upper bound on the value of any subset.

    Attributes:
        chosen: True for items that are taken. bool ``[N]``.
        value: Sum of the chosen values.
        cost: Sum of the chosen costs, at most the budget.
        bound: Upper bound on the value of any subset within the budget; equal to ``value`` if that is proven optimal.
        gap: ``(bound - value) / bound``, from 0 (optimal) to 1; 0 if the bound is 0.
        status: Result of the search; see ``status.advice``.
        seconds: Wall-clock time of the solver.
    """

    chosen: np.ndarray
    value: float
    cost: int
    bound: float
    gap: float
    status: Status
    seconds: float


class Solver(Protocol):
    """Interface of knapsack solvers. Solvers are immutable: configured once, used for any problem."""

    def solve(self, problem: KnapsackProblem) -> Solution:
        """Choose items of maximum total value within the budget."""
        ...


def certify(
    problem: KnapsackProblem, chosen: np.ndarray, bound: float, seconds: float, relative_gap: float = 0.0
) -> Solution:
    """Return the solution that takes ``chosen`` (bool ``[N]``), given a bound that is exact up to ``ROUNDING``.

    Value and cost are recomputed from the problem and do not depend on results of the solver.
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
    """Return ``(bound - value) / bound`` with the bound raised by ``ROUNDING``; 0 if they are equal up to rounding."""
    if bound <= value * (1 + ROUNDING):
        return 0.0
    bound *= 1 + ROUNDING
    return (bound - value) / bound

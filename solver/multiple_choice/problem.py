"""The multiple-choice knapsack problem, whose classes may contain freely combinable members next to options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from solver.problem import KnapsackProblem
from solver.solution import Solution, certify

NO_CLASS = -1


@dataclass(frozen=True)
class MultipleChoiceProblem:
    r"""The knapsack in which, of each class, either one option or any of its members may be taken.

    With :math:`O_k` the options of class k and :math:`M_k` its members,

    .. math::
        \max_x \sum_i v_i x_i \quad \text{subject to} \quad \sum_i c_i x_i \le B, \; x_i \in \{0, 1\}, \quad
        x_m + \sum_{o \in O_k} x_o \le 1 \;\; \forall k, m \in M_k, \quad \sum_{o \in O_k} x_o \le 1 \;\; \forall k

    A class with only options is one of the multiple-choice knapsack (Kellerer, Pferschy and Pisinger, *Knapsack
    Problems*, 2004, chapter 11, here with "at most one" instead of "exactly one"). Items without a class and members of
    a class without options are unconstrained: without any options this is the 0-1 knapsack.

    Attributes:
        values: Value of each item; items with values of zero or less are never chosen. float64 ``[N]``, finite.
        costs: Cost of each item, in whole units. int64 ``[N]``, at least 1.
        budget: Maximum total cost of the chosen items, in the same units. At least 0.
        classes: Class of each item, any number from 0; -1 for no class. int64 ``[N]``.
        exclusive: True for options, which exclude all other items of their class; False for members and items without
            a class. bool ``[N]``.

    Raises:
        ValueError: If a field violates these conditions, or a sum would leave the range of its type.
    """

    values: np.ndarray
    costs: np.ndarray
    budget: int
    classes: np.ndarray
    exclusive: np.ndarray

    def __post_init__(self) -> None:
        knapsack = KnapsackProblem(self.values, self.costs, self.budget)
        object.__setattr__(self, "values", knapsack.values)
        object.__setattr__(self, "costs", knapsack.costs)
        object.__setattr__(self, "budget", knapsack.budget)
        object.__setattr__(self, "classes", _checked_classes(self.classes, knapsack.num_items))
        object.__setattr__(self, "exclusive", _checked_exclusive(self.exclusive, knapsack.num_items))
        homeless = np.flatnonzero(self.exclusive & (self.classes == NO_CLASS))
        if homeless.size:
            raise ValueError(
                f"exclusive: item {homeless[0]} is an option of no class ({homeless.size} such items); "
                "give it a class, or set exclusive to False"
            )

    @property
    def num_items(self) -> int:
        return self.values.size

    def eligible(self) -> np.ndarray:
        """Return the positions of items with a positive value and a cost within the budget, int64 ``[M]``."""
        return np.flatnonzero((self.values > 0) & (self.costs <= self.budget))

    def permits(self, chosen: np.ndarray) -> bool:
        """Whether ``chosen`` (bool ``[N]``) satisfies the constraints of all classes. The budget is not checked."""
        classes = self.classes[chosen]
        contested = classes[self.exclusive[chosen]]
        return bool(np.isin(classes, contested).sum() == contested.size == np.unique(contested).size)


class MultipleChoiceSolver(Protocol):
    """Interface of multiple-choice solvers, immutable like `Solver`."""

    def solve(self, problem: MultipleChoiceProblem) -> Solution:
        """Choose items of maximum total value within the budget, one option or any members of each class."""
        ...


def certify_choice(
    problem: MultipleChoiceProblem, chosen: np.ndarray, bound: float, seconds: float, relative_gap: float = 0.0
) -> Solution:
    """Return `certify` of a choice, after checking that ``chosen`` (bool ``[N]``) satisfies all class constraints."""
    assert problem.permits(chosen), "a solver chose more than one option of a class, or an option and a member"
    knapsack = KnapsackProblem(problem.values, problem.costs, problem.budget)
    return certify(knapsack, chosen, bound, seconds, relative_gap)


def _checked_classes(classes: np.ndarray, num_items: int) -> np.ndarray:
    classes = np.asarray(classes)
    if classes.size == 0:
        classes = classes.astype(np.int64)
    if not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"classes: dtype {classes.dtype}; give whole numbers (int64), -1 for items without a class")
    if classes.shape != (num_items,):
        raise ValueError(f"classes: shape {classes.shape} for {num_items} items; give one number per item")
    bad = np.flatnonzero(classes < NO_CLASS)
    if bad.size:
        raise ValueError(
            f"classes: item {bad[0]} is of class {classes[bad[0]]} ({bad.size} such items); "
            "number classes from 0, and give -1 for items without a class"
        )
    return classes.astype(np.int64, copy=False)


def _checked_exclusive(exclusive: np.ndarray, num_items: int) -> np.ndarray:
    exclusive = np.asarray(exclusive)
    if exclusive.size == 0:
        exclusive = exclusive.astype(bool)
    if exclusive.dtype != bool:
        raise ValueError(f"exclusive: dtype {exclusive.dtype}; give booleans, True for an option")
    if exclusive.shape != (num_items,):
        raise ValueError(f"exclusive: shape {exclusive.shape} for {num_items} items; give one boolean per item")
    return exclusive

"""The 0-1 knapsack problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# OR-Tools sums costs in int64 and does not detect overflow.
LARGEST_TOTAL_COST = 2**62

# Within this range no sum overflows float64, and no relevant density underflows.
SMALLEST_SCALE = 1e-250
LARGEST_SCALE = 1e250


@dataclass(frozen=True)
class KnapsackProblem:
    r"""The 0-1 knapsack: choose items of maximum total value within a budget.

    .. math:: \max_x \sum_i v_i x_i \quad \text{subject to} \quad \sum_i c_i x_i \le B, \; x_i \in \{0, 1\}

    Attributes:
        values: Value of each item; items with values of zero or less are never chosen. float64 ``[N]``, finite.
        costs: Cost of each item, in whole units. int64 ``[N]``, at least 1.
        budget: Maximum total cost of the chosen items, in the same units. At least 0.

    Raises:
        ValueError: If a field violates these conditions, or a sum would leave the range of its type.
    """

    values: np.ndarray
    costs: np.ndarray
    budget: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _checked_values(self.values))
        object.__setattr__(self, "costs", _checked_costs(self.costs))
        object.__setattr__(self, "budget", _checked_budget(self.budget))
        if self.values.size != self.costs.size:
            raise ValueError(
                f"values and costs: {self.values.size} and {self.costs.size} items; give one value and one cost for "
                "each item"
            )

    @property
    def num_items(self) -> int:
        return self.values.size

    def eligible(self) -> np.ndarray:
        """Return the positions of items with a positive value and a cost within the budget, int64 ``[M]``."""
        return np.flatnonzero((self.values > 0) & (self.costs <= self.budget))


def _checked_values(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values: shape {values.shape}; give a vector with one number per item")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"values: item {bad[0]} is {values[bad[0]]} ({bad.size} such items); "
            "give finite numbers, and 0 to leave an item out"
        )
    largest = values.max(initial=0.0)
    if not (largest == 0 or SMALLEST_SCALE <= largest <= LARGEST_SCALE):
        raise ValueError(
            f"values: the largest is {largest:.3g}, outside [{SMALLEST_SCALE:g}, {LARGEST_SCALE:g}], the range in "
            "which sums and ratios are accurate; multiply all values by one constant"
        )
    return values


def _checked_costs(costs: np.ndarray) -> np.ndarray:
    costs = np.asarray(costs)
    if costs.size == 0:
        costs = costs.astype(np.int64)
    if not np.issubdtype(costs.dtype, np.integer):
        raise ValueError(f"costs: dtype {costs.dtype}; give whole numbers (int64) in a unit that makes them whole")
    if costs.ndim != 1:
        raise ValueError(f"costs: shape {costs.shape}; give a vector with one whole number per item")
    bad = np.flatnonzero(costs < 1)
    if bad.size:
        raise ValueError(
            f"costs: item {bad[0]} costs {costs[bad[0]]} ({bad.size} such items); "
            "give at least 1, and handle items without a cost separately"
        )
    total = costs.sum(dtype=np.float64)
    if total >= LARGEST_TOTAL_COST:
        raise ValueError(f"costs: their sum {total:.3g} is not below 2^62; use a coarser unit")
    return costs.astype(np.int64, copy=False)


def _checked_budget(budget: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int | np.integer):
        raise ValueError(f"budget: {budget!r}; give a whole number, in the unit of the costs")
    if budget < 0:
        raise ValueError(f"budget: {budget}; give 0 or more")
    return int(budget)

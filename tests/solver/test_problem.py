"""Invalid problems raise errors that state the remedy."""

from __future__ import annotations

import numpy as np
import pytest

from solver import KnapsackProblem

ONES = np.ones(3)
COSTS = np.array([1, 2, 3])


@pytest.mark.parametrize(
    ("values", "costs", "budget", "message"),
    [
        (np.ones((3, 1)), COSTS, 1, r"values: shape \(3, 1\); give a vector"),
        (np.array([1.0, np.nan, np.inf]), COSTS, 1, r"values: item 1 is nan \(2 such items\); give finite numbers"),
        (np.full(3, 1e300), COSTS, 1, r"values: the largest is 1e\+300.*multiply all values"),
        (np.full(3, 1e-300), COSTS, 1, r"values: the largest is 1e-300.*multiply all values"),
        (ONES, np.array([1.5, 2, 3]), 1, "costs: dtype float64; give whole numbers"),
        (ONES, np.ones((1, 3), dtype=int), 1, r"costs: shape \(1, 3\); give a vector"),
        (ONES, np.array([1, 0, -2]), 1, r"costs: item 1 costs 0 \(2 such items\); give at least 1"),
        (ONES, np.full(3, 2**61), 1, r"costs: their sum 6\.92e\+18 is not below 2\^62; use a coarser unit"),
        (ONES, COSTS[:2], 1, "values and costs: 3 and 2 items; give one value and one cost for each item"),
        (ONES, COSTS, -1, "budget: -1; give 0 or more"),
        (ONES, COSTS, 2.5, r"budget: 2\.5; give a whole number"),
        (ONES, COSTS, True, "budget: True; give a whole number"),
    ],
)
def test_nonsense_is_refused(values, costs, budget, message):
    with pytest.raises(ValueError, match=message):
        KnapsackProblem(values, costs, budget)


def test_narrower_numbers_are_widened():
    problem = KnapsackProblem(ONES.astype(np.float32), COSTS.astype(np.int32), np.int64(4))
    assert (problem.values.dtype, problem.costs.dtype, type(problem.budget)) == (np.float64, np.int64, int)


def test_eligible_items_are_worth_something_and_affordable():
    problem = KnapsackProblem(np.array([1.0, 0.0, -1.0, 2.0, 3.0]), np.array([5, 1, 1, 6, 2]), 5)
    assert problem.eligible().tolist() == [0, 4]

"""Problems with invalid classes raise errors that state the remedy."""

from __future__ import annotations

import numpy as np
import pytest

from solver import MultipleChoiceProblem
from solver.multiple_choice.problem import certify_choice

ONES = np.ones(3)
COSTS = np.array([1, 2, 3])
CLASSES = np.array([0, 0, -1])
EXCLUSIVE = np.array([True, False, False])


@pytest.mark.parametrize(
    ("values", "classes", "exclusive", "message"),
    [
        (np.array([1.0, np.nan, 1.0]), CLASSES, EXCLUSIVE, "values: item 1 is nan"),
        (ONES, CLASSES.astype(float), EXCLUSIVE, "classes: dtype float64; give whole numbers"),
        (ONES, CLASSES[:2], EXCLUSIVE, r"classes: shape \(2,\) for 3 items; give one number per item"),
        (
            ONES,
            np.array([0, -2, -3]),
            EXCLUSIVE,
            r"classes: item 1 is of class -2 \(2 such items\); number classes from 0",
        ),
        (ONES, CLASSES, EXCLUSIVE.astype(int), "exclusive: dtype int64; give booleans"),
        (ONES, CLASSES, EXCLUSIVE[None], r"exclusive: shape \(1, 3\) for 3 items; give one boolean per item"),
        (ONES, CLASSES, np.array([True, False, True]), r"exclusive: item 2 is an option of no class \(1 such items\)"),
    ],
)
def test_nonsense_is_refused(values, classes, exclusive, message):
    with pytest.raises(ValueError, match=message):
        MultipleChoiceProblem(values, COSTS, 5, classes, exclusive)


@pytest.mark.parametrize(
    ("chosen", "permitted"),
    [
        ([0, 0, 0, 0, 0], True),
        ([0, 0, 1, 1, 1], True),
        ([1, 0, 0, 0, 1], True),
        ([1, 1, 0, 0, 0], False),
        ([0, 1, 1, 0, 0], False),
    ],
)
def test_a_class_holds_one_option_or_members(chosen: list[int], permitted: bool):
    classes, exclusive = np.array([4, 4, 4, 4, -1]), np.array([True, True, False, False, False])
    problem = MultipleChoiceProblem(np.ones(5), np.ones(5, dtype=int), 5, classes, exclusive)
    mask = np.array(chosen, dtype=bool)
    assert problem.permits(mask) is permitted
    if not permitted:
        with pytest.raises(AssertionError, match="more than one option of a class"):
            certify_choice(problem, mask, bound=5.0, seconds=0.0)

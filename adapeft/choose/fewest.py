"""The fewest parameters that promise nearly what a whole budget promises, for ``select.budget: auto``."""

from __future__ import annotations

import math
from collections.abc import Callable

from adapeft.subset.subset import Subset

ENOUGH = 0.99
"""Share of the value of the whole budget. On STS-B (seed 0) 1,668 elements have it, of 2,399 that promise anything.
With 0.95, 1,238 elements, the score falls (tests/benchmarks/results/stsb.md)."""

_STEP = 1.05
"""Ratio to the largest budget that is too small at which the search ends; each halving of the rest costs a choice."""


def fewest(best: Subset, choose: Callable[[int], Subset]) -> Subset:
    """Return the choice at the smallest budget that has ``ENOUGH`` of the value of ``best``, found up to 5 %.

    Args:
        best: choice at the whole budget.
        choose: choice at another budget, in elements.
    """
    wanted = ENOUGH * best.choice.needed("value")
    too_few, found = 1, best
    while found.count > max(too_few + 1, _STEP * too_few):
        budget = round(math.sqrt(too_few * found.count))
        fewer = choose(budget)
        if fewer.choice.needed("value") >= wanted:
            found = fewer
        else:
            too_few = budget
    return found

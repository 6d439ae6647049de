"""A search for the peak of noisy scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def climb(
    score: Callable[[int], Any],
    start: int,
    count: int,
    is_far: Callable[[Any, Any], bool] = lambda low, best: False,
    *,
    width: int = 2,
) -> int:
    """Return the index of the peak that is reached from ``start`` by steps to the best-scoring neighbour.

    A peak is above ``width`` neighbours on each side: of noisy scores, one above its direct neighbours may be none.

    Args:
        score: score of an index, called once per index, only for those on and next to the path.
        start: index to start from.
        count: number of indices.
        is_far: whether a score is so far below the best one that it is no noise; nothing above its index is tried.
        width: number of neighbours.
    """
    found = {start: score(start)}
    best = start
    while True:
        for step in range(1, width + 1):
            for index in (best - step, best + step):
                end = min((one for one in found if one > best and is_far(found[one], found[best])), default=count)
                if 0 <= index < end and index not in found:
                    found[index] = score(index)
            peak = max(found, key=found.__getitem__)
            if peak != best:
                best = peak
                break
        else:
            return best

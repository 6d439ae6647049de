"""A search for the peak of noisy scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def climb(score: Callable[[int], Any], start: int, count: int) -> int:
    """Return the index of the peak that is reached from ``start`` by steps to the best-scoring neighbour.

    A peak is above two neighbours on each side: runs are noisy, so one above its direct neighbours may be no peak.

    Args:
        score: score of an index, called once per index, only for those on and next to the path.
        start: index to start from.
        count: number of indices.
    """
    found = {start: score(start)}
    best = start
    while True:
        for step in (1, 2):
            for index in (best - step, best + step):
                if 0 <= index < count and index not in found:
                    found[index] = score(index)
            peak = max(found, key=found.__getitem__)
            if peak != best:
                best = peak
                break
        else:
            return best

"""A draw of candidates of several costs within a budget."""

from __future__ import annotations

import numpy as np


def fitting(order: np.ndarray, costs: np.ndarray, budget: int) -> np.ndarray:
    """Return a mask [K] of the candidates that are taken: one after the other in ``order``, each that still fits.

    Args:
        order: numbers of the candidates that may be taken, in the order of the draw.
        costs: int64 [K].
        budget: largest total cost.
    """
    mask, left = np.zeros(len(costs), dtype=bool), budget
    for candidate in order:
        if costs[candidate] <= left:
            mask[candidate] = True
            left -= int(costs[candidate])
    return mask

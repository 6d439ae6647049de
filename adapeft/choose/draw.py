"""Uniform draws within a budget: of single elements, which cost the same, and of candidates of several costs."""

from __future__ import annotations

import numpy as np

from adapeft.measure.groups import Groups

_FEW = 50
"""NumPy draws at most one of this many numbers with a set of those drawn, and more by shuffling all, 8 bytes each."""


def draw_elements(groups: Groups, count: int, seed: int) -> np.ndarray:
    """Return the positions of a uniform draw of ``count`` elements of all candidates in random order, int64."""
    total, draw = int(groups.starts[-1]), np.random.default_rng([seed, 2])
    return _draw_many(draw, total, count) if _are_many(total, count) else draw.choice(total, count, replace=False)


def drawing_bytes(total: int, count: int) -> int:
    """Return the most bytes that ``draw_elements`` needs to draw ``count`` of ``total`` elements."""
    places = 8 * 2.4 * count  # of NumPy's set: a power of two from 1.2 for each number
    return 8 * count + (2 * total if _are_many(total, count) else int(places))


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


def _are_many(total: int, count: int) -> bool:
    return count > total // _FEW


def _draw_many(draw: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Return ``count`` different numbers below ``total`` in random order, with two bytes for each of ``total``.

    Numbers are drawn until as many are different, which treats all alike: above the half, those that stay out.
    """
    fewer = min(count, total - count)
    mask = np.zeros(total, dtype=bool)
    while missing := fewer - np.count_nonzero(mask):
        mask[draw.integers(total, size=missing)] = True
    drawn = np.flatnonzero(mask if fewer == count else ~mask)
    draw.shuffle(drawn)
    return drawn

"""The greedy method: items by density, skipping those that do not fit."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from solver.problem import KnapsackProblem
from solver.relaxation import Relaxation
from solver.solution import Solution, certify


@dataclass(frozen=True)
class Greedy:
    """Take the items of highest value per cost first, skipping those that no longer fit.

    The bound is that of the fractional relaxation. The solution depends only on the order of the densities, so values
    that differ by rounding give the same subset.
    """

    def solve(self, problem: KnapsackProblem) -> Solution:
        """Choose greedily; the status is optimal only if the bound proves it."""
        started = time.perf_counter()
        relaxation = Relaxation.of(problem)
        taken = take_greedily(relaxation)
        chosen = relaxation.chosen(taken, problem.num_items)
        return certify(problem, chosen, relaxation.bound, time.perf_counter() - started)


def take_greedily(relaxation: Relaxation) -> np.ndarray:
    """Return the greedy subset as a mask by rank, bool ``[M]``."""
    return fill(relaxation, relaxation.prefix(), relaxation.room)


def fill(relaxation: Relaxation, taken: np.ndarray, room: int) -> np.ndarray:
    """Add to ``taken`` (a mask by rank, bool ``[M]``) the items that fit the remaining ``room``, densest first."""
    taken = taken.copy()
    fitting = np.flatnonzero(~taken & (relaxation.costs <= room))
    # One pass suffices: an item that does not fit now will not fit later, because the room only shrinks.
    for rank, cost in zip(fitting.tolist(), relaxation.costs[fitting].tolist(), strict=True):
        if cost <= room:
            taken[rank] = True
            room -= cost
    return taken

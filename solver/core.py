"""The core method: search only the items whose decision is not settled by the relaxation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from solver.branch_and_bound import branch
from solver.cp_sat import constrain
from solver.greedy import fill, take_greedily
from solver.problem import KnapsackProblem
from solver.relaxation import Relaxation
from solver.solution import Solution, certify, relative_gap_between

# A core of this size takes well under a millisecond, and is often sufficient.
SMALLEST_CORE = 32
GROWTH = 4

# Branch and bound finishes in milliseconds, or never if all densities are similar or the budget cannot be filled.
BRANCH_SECONDS = 0.2


@dataclass(frozen=True)
class CoreKnapsack:
    r"""Greedy first; then an exact search of the items around the break item, with all others fixed.

    A best subset differs from the fractional solution almost only near the break item (Balas and Zemel, *An algorithm
    for large zero-one knapsack problems*, 1980; Martello and Toth, *Knapsack Problems*, 1990, section 2.6). Let U be
    the fractional bound, z the best value found and :math:`p_i` the penalty of deciding item i against the fractional
    solution. No better subset decides against it an item with :math:`p_i \ge U - z`, so these items are fixed. The core
    consists of the other items nearest to the break item in density. It is solved by OR-Tools' branch and bound, or by
    CP-SAT if that runs out of time; greedy fills the remaining budget. A solved core gives a certificate: a subset
    either agrees with the fractional solution outside the core or pays a penalty there, so

    .. math:: \text{optimum} \le \max(z, \; z_\text{core}, \; U - \min_{i \notin \text{core}} p_i).

    Cores grow up to ``core_size`` while the gap stays open.

    Greedy depends only on the order of the densities. With a ``relative_gap`` of about 1e-4 its solution usually
    suffices, and then rounding differences in the values, as between world sizes, do not change the subset.

    Attributes:
        core_size: Maximum number of items to search.
        relative_gap: Stop once the value is proven to be within this fraction of the bound. At 0 the search continues
            until the optimum is proven, the core is exhausted or the time is up.
        time_limit: Time limit of the search in seconds; each core gets a share in proportion to its size. If a core
            uses up its share, the solution may depend on the machine.

    Raises:
        ValueError: If a setting is out of range.
    """

    core_size: int = 4096
    relative_gap: float = 0.0
    time_limit: float = 10.0

    def __post_init__(self) -> None:
        if self.core_size < 1:
            raise ValueError(f"core_size: {self.core_size}; give at least 1 (a few thousand is usual)")
        if not 0 <= self.relative_gap < 1:
            raise ValueError(f"relative_gap: {self.relative_gap}; give a fraction from 0 up to 1, such as 1e-4")
        if not self.time_limit > 0:
            raise ValueError(f"time_limit: {self.time_limit}; give a number of seconds above 0")

    def solve(self, problem: KnapsackProblem) -> Solution:
        """Choose items: greedy's subset if it is within ``relative_gap``, else the best of greedy's and the cores'."""
        started = time.perf_counter()
        relaxation = Relaxation.of(problem)
        taken, bound = self._branch(relaxation, take_greedily(relaxation), deadline=started + self.time_limit)
        chosen = relaxation.chosen(taken, problem.num_items)
        return certify(problem, chosen, bound, time.perf_counter() - started, self.relative_gap)

    def _closes(self, value: float, bound: float) -> bool:
        return relative_gap_between(value, bound) <= self.relative_gap

    def _branch(self, relaxation: Relaxation, best: np.ndarray, deadline: float) -> tuple[np.ndarray, float]:
        """Return the best of ``best`` and the cores' subsets (mask by rank, bool ``[M]``) and a bound on any subset."""
        value = _worth(relaxation, best)
        bound = relaxation.bound
        penalties = relaxation.penalties()
        unsettled = np.flatnonzero(penalties < relaxation.bound - value)

        sizes = list(self._sizes(len(unsettled)))
        for round_, size in enumerate(sizes):
            remaining = deadline - time.perf_counter()
            if remaining <= 0 or self._closes(value, bound):
                break
            core, outside = _split(unsettled, relaxation.break_rank, size)
            # A small core can be harder, because it has fewer items that fill the budget exactly.
            time_limit = remaining * size / sum(sizes[round_:])
            taken, core_bound = _solve_core(relaxation, core, time_limit)
            if (worth := _worth(relaxation, taken)) > value:
                best, value = taken, worth
            flip_bound = relaxation.bound - penalties[outside].min(initial=np.inf)
            bound = min(bound, max(value, core_bound, flip_bound))
        return best, bound

    def _sizes(self, num_unsettled: int) -> Iterator[int]:
        size = SMALLEST_CORE
        largest = min(self.core_size, num_unsettled)
        while size < largest:
            yield size
            size *= GROWTH
        yield largest


def _worth(relaxation: Relaxation, taken: np.ndarray) -> float:
    return float(relaxation.values[taken].sum())


def _split(unsettled: np.ndarray, break_rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split into the ``size`` ranks around the break item, half on either side if possible, and the other ranks."""
    middle = int(np.searchsorted(unsettled, break_rank))
    first = max(0, min(middle - size // 2, len(unsettled) - size))
    window = slice(first, first + size)
    return unsettled[window], np.delete(unsettled, window)


def _solve_core(relaxation: Relaxation, core: np.ndarray, time_limit: float) -> tuple[np.ndarray, float]:
    """Search the ranks in ``core``, with the others as in the fractional solution; then fill the remaining budget.

    Returns:
        The items taken, a mask by rank (bool ``[M]``), and a bound on the value of any subset that differs from the
        fractional solution only in the core.
    """
    taken = relaxation.prefix()
    room = relaxation.room + int(relaxation.costs[core][taken[core]].sum())
    taken[core] = False
    fixed_value = _worth(relaxation, taken)

    taken[core], core_bound = _search(relaxation.values[core], relaxation.costs[core], room, time_limit)
    room -= int(relaxation.costs[core][taken[core]].sum())
    return fill(relaxation, taken, room), fixed_value + core_bound


def _search(values: np.ndarray, costs: np.ndarray, budget: int, time_limit: float) -> tuple[np.ndarray, float]:
    """Try branch and bound briefly, then CP-SAT: problems that are hard for one are often easy for the other."""
    started = time.perf_counter()
    branched, bound = branch(values, costs, budget, min(BRANCH_SECONDS, time_limit / 2))
    if bound < np.inf:
        return branched, bound
    constrained, bound = constrain(values, costs, budget, time_limit - (time.perf_counter() - started))
    return max(branched, constrained, key=lambda taken: values[taken].sum()), bound

"""The core method for classes: search only the decisions that are not settled by the relaxation."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from solver.core import GROWTH, SMALLEST_CORE
from solver.multiple_choice.cp_sat import NONE, Choices, choose
from solver.multiple_choice.greedy import fill
from solver.multiple_choice.problem import MultipleChoiceProblem, certify_choice
from solver.multiple_choice.relaxation import MEMBERS, ChoiceRelaxation
from solver.solution import ROUNDING, Solution, relative_gap_between


@dataclass(frozen=True)
class MultipleChoiceCore:
    r"""Greedy first; then an exact search of the decisions of least penalty, with all others as in the relaxation.

    `CoreKnapsack` with classes (Pisinger, *A minimal algorithm for the multiple-choice knapsack problem*, 1995, where
    the core consists of classes). Let U be the relaxation's bound, z the best value found and :math:`p_i` the penalty
    of decision i against the relaxation: to use the members of a class, to use another of its options, or to flip a
    member. No better choice contains a decision with :math:`p_i \ge U - z`, so these are settled. Of the other
    decisions, those of least penalty form the core, which CP-SAT solves; greedy fills the remaining budget. A solved
    core gives a certificate: a choice either agrees with the relaxation outside the core or pays a penalty there, so

    .. math:: \text{optimum} \le \max(z, \; z_\text{core}, \; U - \min_{i \notin \text{core}} p_i).

    Cores grow up to ``core_size`` while the gap stays open. Limits do not depend on the clock, so the solution is the
    same on a slow or busy machine.

    Attributes:
        core_size: Maximum number of decisions to search.
        relative_gap: Stop once the value is proven to be within this fraction of the bound. At 0 the search continues
            until the optimum is proven, the core is exhausted or the work limit is reached.
        work_limit: Limit of the search in OR-Tools' deterministic time, in units of roughly a second; each core gets a
            share in proportion to its size.

    Raises:
        ValueError: If a setting is out of range.
    """

    core_size: int = 16384
    relative_gap: float = 0.0
    work_limit: float = 10.0

    def __post_init__(self) -> None:
        if self.core_size < 1:
            raise ValueError(f"core_size: {self.core_size}; give at least 1 (about ten thousand is usual)")
        if not 0 <= self.relative_gap < 1:
            raise ValueError(f"relative_gap: {self.relative_gap}; give a fraction from 0 up to 1, such as 1e-4")
        if not self.work_limit > 0:
            raise ValueError(f"work_limit: {self.work_limit}; give a number above 0, roughly in seconds")

    def solve(self, problem: MultipleChoiceProblem) -> Solution:
        """Choose items: greedy's choice if it is within ``relative_gap``, else the best of greedy's and the cores'."""
        started = time.perf_counter()
        relaxation = ChoiceRelaxation.of(problem)
        chosen, bound = self._search(problem, relaxation)
        return certify_choice(problem, chosen, bound, time.perf_counter() - started, self.relative_gap)

    def _search(self, problem: MultipleChoiceProblem, relaxation: ChoiceRelaxation) -> tuple[np.ndarray, float]:
        """Return the best choice found (bool ``[N]``), and a bound on any choice."""
        candidates, bound = relaxation.candidates, relaxation.bound
        best = candidates.mask(*fill(candidates, relaxation.modes, relaxation.taken), problem.num_items)
        value = float(problem.values[best].sum())
        decisions = _Decisions.of(relaxation, relaxation.bound - value)

        # Half of the gap at which the search ends, so that the gap that CP-SAT leaves is safely below it.
        slack = max(self.relative_gap, ROUNDING) / 2 * relaxation.bound
        size, work_left = SMALLEST_CORE, self.work_limit
        while work_left > 0 and relative_gap_between(value, bound) > self.relative_gap:
            # The result of the last core may have settled more decisions.
            largest = min(self.core_size, decisions.num_below(relaxation.bound - value))
            size = min(size, largest)
            core = _Core.of(relaxation, decisions.order[:size])
            share = work_left if size == largest else work_left * size / largest
            search = choose(core.choices, core.budget, share, slack)
            work_left -= search.work
            chosen = candidates.mask(*fill(candidates, *core.inverted(search.taken)), problem.num_items)
            if (worth := float(problem.values[chosen].sum())) > value:
                best, value = chosen, worth
            bound = min(bound, max(value, core.value + search.bound, relaxation.bound - decisions.penalty_after(size)))
            if size == largest:
                break
            size *= GROWTH
        return best, bound


@dataclass(frozen=True)
class _Decisions:
    """The D unsettled decisions against the relaxation, by ascending penalty.

    Numbering: first C decisions to use the members of a class, then O to take an option, then M to flip a member.

    Attributes:
        order: Numbers of the decisions. int64 ``[D]``.
        penalties: Penalties of the decisions. float64 ``[D]``.
    """

    order: np.ndarray
    penalties: np.ndarray

    @classmethod
    def of(cls, relaxation: ChoiceRelaxation, settling: float) -> _Decisions:
        """Return the decisions with a penalty below ``settling``."""
        modes = relaxation.modes
        # To keep the mode of the relaxation is no decision.
        of_modes = np.where(modes == MEMBERS, np.inf, relaxation.mode_penalties)
        of_options = relaxation.option_penalties.copy()
        of_options[modes[modes != MEMBERS]] = np.inf
        penalties = np.concatenate((of_modes, of_options, relaxation.member_penalties))
        # Stable: a class comes before its members, none of which has a lower penalty.
        unsettled = np.flatnonzero(penalties < settling)
        order = unsettled[np.argsort(penalties[unsettled], kind="stable")]
        return cls(order, penalties[order])

    def num_below(self, penalty: float) -> int:
        """Return the number of decisions with a lower penalty."""
        return int(np.searchsorted(self.penalties, penalty))

    def penalty_after(self, num_decisions: int) -> float:
        """Return the least penalty after the first ``num_decisions``; infinite if there are no more."""
        return float(self.penalties[num_decisions]) if num_decisions < self.penalties.size else np.inf


@dataclass(frozen=True)
class _Core:
    """The problem that is left when all decisions outside the core are fixed.

    The choices are the core's members, then its options, then one item for each class that may use its members or an
    option. This item stands for the members outside the core that are worth more than their price.

    Attributes:
        relaxation: Relaxation that fixes all other decisions.
        choices: Items of the core problem.
        budget: Budget of the core problem.
        value: Total value of the fixed items.
        members: Members in the core. int64.
        options: Options in the core. int64.
        classes: Classes that may use their members or an option. int64.
    """

    relaxation: ChoiceRelaxation
    choices: Choices
    budget: int
    value: float
    members: np.ndarray
    options: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(cls, relaxation: ChoiceRelaxation, decisions: np.ndarray) -> _Core:
        """Return the core of some decisions, numbered as in `_Decisions`."""
        candidates, modes = relaxation.candidates, relaxation.modes
        num_classes, num_options = candidates.num_classes, candidates.options.size
        to_members = decisions[decisions < num_classes]
        options = decisions[(decisions >= num_classes) & (decisions < num_classes + num_options)] - num_classes
        members = decisions[decisions >= num_classes + num_options] - num_classes - num_options

        open_ = np.zeros(num_classes, dtype=bool)
        open_[to_members] = open_[candidates.option_classes[options]] = True
        # The option that the relaxation takes in an open class remains a choice.
        options = np.append(options, modes[open_ & (modes != MEMBERS)])
        may_have_members = modes == MEMBERS
        may_have_members[to_members] = True
        classes = np.flatnonzero(open_ & may_have_members)

        kept = relaxation.taken.copy()
        kept[members] = False
        kept_values = candidates.sum_members(np.where(kept, candidates.member_values, 0.0))
        kept_costs = candidates.sum_members(np.where(kept, candidates.member_costs, 0))
        closed_members = ~open_ & (modes == MEMBERS)
        closed_options = modes[~open_ & (modes != MEMBERS)]
        needed = np.full(num_classes, NONE, dtype=np.int64)
        needed[classes] = members.size + options.size + np.arange(classes.size)
        return cls(
            relaxation=relaxation,
            choices=Choices(
                values=np.concatenate(
                    (candidates.member_values[members], candidates.option_values[options], kept_values[classes])
                ),
                costs=np.concatenate(
                    (candidates.member_costs[members], candidates.option_costs[options], kept_costs[classes])
                ),
                classes=np.concatenate((np.full(members.size, NONE), candidates.option_classes[options], classes)),
                needs=np.concatenate(
                    (needed[candidates.member_classes[members]], np.full(options.size + classes.size, NONE))
                ),
            ),
            budget=candidates.budget
            - int(kept_costs[closed_members].sum())
            - int(candidates.option_costs[closed_options].sum()),
            value=float(kept_values[closed_members].sum() + candidates.option_values[closed_options].sum()),
            members=members,
            options=options,
            classes=classes,
        )

    def inverted(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the complete choice: the mode of each class (int64 ``[C]``) and the members taken (bool ``[M]``)."""
        members, options, kept = np.split(chosen, [self.members.size, self.members.size + self.options.size])
        candidates = self.relaxation.candidates
        modes = self.relaxation.modes.copy()
        modes[candidates.option_classes[self.options]] = MEMBERS
        modes[candidates.option_classes[self.options[options]]] = self.options[options]

        taken = self.relaxation.taken.copy()
        taken[self.members] = members
        # A class may take nothing: then its members outside the core are not taken.
        has_members = np.ones(candidates.num_classes, dtype=bool)
        has_members[candidates.option_classes[self.options]] = False
        has_members[self.classes[kept]] = True
        return modes, taken & has_members[candidates.member_classes]

"""The greedy method for classes: the relaxation's choice, then by density the items that fit the remaining budget."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from solver.multiple_choice.problem import MultipleChoiceProblem, certify_choice
from solver.multiple_choice.relaxation import MEMBERS, Candidates, ChoiceRelaxation
from solver.solution import Solution


@dataclass(frozen=True)
class MultipleChoiceGreedy:
    """Take the relaxation's choice, then fill the remaining budget by density.

    The bound is that of the relaxation. Without options this is `Greedy`: items by density, skipping those that do not
    fit.
    """

    def solve(self, problem: MultipleChoiceProblem) -> Solution:
        """Choose greedily; the status is optimal only if the bound proves it."""
        started = time.perf_counter()
        relaxation = ChoiceRelaxation.of(problem)
        modes, taken = fill(relaxation.candidates, relaxation.modes, relaxation.taken)
        chosen = relaxation.candidates.mask(modes, taken, problem.num_items)
        return certify_choice(problem, chosen, relaxation.bound, time.perf_counter() - started)


def fill(candidates: Candidates, modes: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add members and replace choices of classes by better options within the budget, by descending density.

    The density of an option is the value that it adds per cost that it adds. An option is only replaced by a better
    option.

    Args:
        candidates: Items to choose from.
        modes: Option of each class, or `MEMBERS`; within the budget together with ``taken``. int64 ``[C]``.
        taken: True for members taken if the mode is `MEMBERS`. bool ``[M]``.

    Returns:
        The new ``modes`` and ``taken``.
    """
    modes, taken = modes.copy(), taken & (modes[candidates.member_classes] == MEMBERS)
    values, costs = _worth(candidates, modes, taken)
    room = candidates.budget - int(costs.sum())

    added_values = candidates.option_values - values[candidates.option_classes]
    added_costs = candidates.option_costs - costs[candidates.option_classes]
    options = np.flatnonzero((added_values > 0) & (added_costs <= room))
    open_ = ~taken & (modes[candidates.member_classes] == MEMBERS)
    members = np.flatnonzero(open_ & (candidates.member_costs <= room))
    densities = np.append(
        candidates.member_values[members] / candidates.member_costs[members],
        # Options that add value at no cost come first.
        added_values[options] / np.maximum(added_costs[options], 0.5),
    )
    positions = np.append(candidates.members[members], candidates.options[options])
    for index in np.lexsort((positions, -densities)).tolist():
        if index < members.size:
            member = members[index]
            of, cost = candidates.member_classes[member], int(candidates.member_costs[member])
            if cost <= room and modes[of] == MEMBERS:
                taken[member] = True
                values[of] += candidates.member_values[member]
                costs[of] += cost
                room -= cost
        else:
            option = options[index - members.size]
            of = candidates.option_classes[option]
            cost = int(candidates.option_costs[option] - costs[of])
            if cost <= room and candidates.option_values[option] > values[of]:
                modes[of] = option
                values[of], costs[of] = candidates.option_values[option], candidates.option_costs[option]
                room -= cost
    return modes, taken & (modes[candidates.member_classes] == MEMBERS)


def _worth(candidates: Candidates, modes: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the value (float64 ``[C]``) and cost (int64 ``[C]``) of each class."""
    values = candidates.sum_members(np.where(taken, candidates.member_values, 0.0))
    costs = candidates.sum_members(np.where(taken, candidates.member_costs, 0))
    chosen = modes != MEMBERS
    values[chosen] = candidates.option_values[modes[chosen]]
    costs[chosen] = candidates.option_costs[modes[chosen]]
    return values, costs

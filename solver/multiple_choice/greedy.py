"""The relaxation's choice, and what fits the room it leaves, by density."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from solver.multiple_choice.problem import MultipleChoiceProblem, certify_choice
from solver.multiple_choice.relaxation import MEMBERS, Candidates, ChoiceRelaxation
from solver.solution import Solution


@dataclass(frozen=True)
class MultipleChoiceGreedy:
    """Take what is worth more than its price, then fill the room that is left, densest first.

    The bound is the relaxation's. With no options this is `Greedy`: the items by density, skipping what does not fit.
    """

    def solve(self, problem: MultipleChoiceProblem) -> Solution:
        """Choose greedily; optimal only where the bound shows it."""
        started = time.perf_counter()
        relaxation = ChoiceRelaxation.of(problem)
        modes, taken = fill(relaxation.candidates, relaxation.modes, relaxation.taken)
        chosen = relaxation.candidates.mask(modes, taken, problem.num_items)
        return certify_choice(problem, chosen, relaxation.bound, time.perf_counter() - started)


def fill(candidates: Candidates, modes: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add members, and put options in the place of less, while the budget allows, densest first.

    An option's density is that of what it adds. A class that has an option gives it up for a better one alone.

    Args:
        candidates: What there is to choose from.
        modes: The option of each class, or `MEMBERS`; within the budget together with ``taken``. int64 ``[C]``.
        taken: The members taken where the mode is `MEMBERS`. bool ``[M]``.

    Returns:
        Modes and members like those given.
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
        # What is worth more and costs no more comes first.
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
    """What each class is worth (float64 ``[C]``) and costs (int64 ``[C]``)."""
    values = candidates.sum_members(np.where(taken, candidates.member_values, 0.0))
    costs = candidates.sum_members(np.where(taken, candidates.member_costs, 0))
    chosen = modes != MEMBERS
    values[chosen] = candidates.option_values[modes[chosen]]
    costs[chosen] = candidates.option_costs[modes[chosen]]
    return values, costs

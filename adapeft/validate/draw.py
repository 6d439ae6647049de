"""Random subsets to try a prediction on: some tensors, and random groups of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.subset.subset import Subset


@dataclass(frozen=True)
class Draw:
    """A random subset.

    Attributes:
        size: the fraction of the candidates' elements that was aimed at; 0 for a single tensor or its like.
        units: candidate → int64, its chosen groups (single elements at ``element`` granularity), ascending.
        count: elements.
    """

    size: float
    units: Mapping[int, Tensor]
    count: int


def draw_subsets(groups: Groups, sizes: Sequence[float], num_each: int, num_singles: int, seed: int) -> list[Draw]:
    """``num_each`` draws of every size, and ``num_singles`` of the groups of one tensor alone.

    A draw first takes a random number of tensors, then random groups among theirs: groups drawn evenly from the whole
    model would all have the same prediction, which tells nothing.

    Args:
        sizes: fractions of the candidates' elements.
        seed: of everything drawn.
    """
    random = np.random.default_rng([seed, 4])
    total = sum(info.count for info in groups.parameters)
    draws = [_draw(groups, size, round(size * total), random) for size in sizes for _ in range(num_each)]
    singles = random.permutation(len(groups.parameters))[:num_singles]
    whole = {int(index): torch.arange(groups.num_units(int(index))) for index in singles}
    return draws + [Draw(0.0, {index: units}, groups.parameters[index].count) for index, units in whole.items()]


def subset_of_draw(groups: Groups, draw: Draw) -> Subset:
    """The subset that trains a draw and, as training does, the always-trained part."""
    parts = {groups.parameters[index].name: groups.part(index, units) for index, units in draw.units.items()}
    return Subset(parts, always_train=groups.always_train, new=groups.new)


def _draw(groups: Groups, size: float, budget: int, random: np.random.Generator) -> Draw:
    order = random.permutation(len(groups.parameters))
    # Log-uniform, so that a handful of tensors is as likely as most of them; enough of them to fill the size.
    counts = np.cumsum([groups.parameters[index].count for index in order])
    fewest = int(np.searchsorted(counts, budget)) + 1
    num_tensors = round(np.exp(random.uniform(np.log(min(fewest, len(order))), np.log(len(order)))))
    units: dict[int, Tensor] = {}
    costs = {int(index): _unit_cost(groups, int(index)) for index in order[:num_tensors]}
    members = np.concatenate(
        [np.stack([np.full(groups.num_units(i), i), np.arange(groups.num_units(i))]) for i in costs], axis=1
    )
    members = members[:, random.permutation(members.shape[1])]
    spent = np.cumsum([costs[index] for index in members[0].tolist()])
    taken = members[:, : max(1, int(np.searchsorted(spent, budget, side="right")))]
    for index in np.unique(taken[0]).tolist():
        units[index] = torch.from_numpy(np.sort(taken[1][taken[0] == index]))
    return Draw(size, units, sum(len(chosen) * costs[index] for index, chosen in units.items()))


def _unit_cost(groups: Groups, index: int) -> int:
    return groups.parameters[index].count // groups.num_units(index)

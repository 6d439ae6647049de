"""Random subsets to test predictions: random groups of random tensors."""

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
        size: target fraction of the candidates' elements; 0 for the groups of a single tensor.
        units: candidate → its chosen groups (elements at ``element`` granularity), int64, ascending.
        count: number of elements.
    """

    size: float
    units: Mapping[int, Tensor]
    count: int


def draw_subsets(groups: Groups, sizes: Sequence[float], num_each: int, num_singles: int, seed: int) -> list[Draw]:
    """Return ``num_each`` draws of every size, and ``num_singles`` draws of all groups of one tensor.

    A draw first takes a random number of tensors, then random groups among theirs. Groups drawn uniformly from the
    whole model would all have the same prediction, which is not informative.

    Args:
        sizes: fractions of the candidates' elements.
        seed: random seed.
    """
    random = np.random.default_rng([seed, 4])
    total = sum(info.count for info in groups.parameters)
    draws = [_draw(groups, size, round(size * total), random) for size in sizes for _ in range(num_each)]
    singles = random.permutation(len(groups.parameters))[:num_singles]
    whole = {int(index): torch.arange(groups.num_units(int(index))) for index in singles}
    return draws + [Draw(0.0, {index: units}, groups.parameters[index].count) for index, units in whole.items()]


def subset_of_draw(groups: Groups, draw: Draw) -> Subset:
    """Return the subset that trains a draw and, as in real training, the always-trained part."""
    parts = {groups.parameters[index].name: groups.part(index, units) for index, units in draw.units.items()}
    return Subset(parts, always_train=groups.always_train, new=groups.new)


def _draw(groups: Groups, size: float, budget: int, random: np.random.Generator) -> Draw:
    order = random.permutation(len(groups.parameters))
    # Log-uniform, so that few tensors are as likely as most of them, and at least enough to fill the size.
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

"""How good a transferred subset is where the target could be measured after all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from adapeft.choose.elements import shares
from adapeft.choose.knapsack import chosen_of
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import ValuedMethod
from adapeft.subset.subset import Subset
from adapeft.transfer.transfer import Allotment, Scores, fill


@dataclass(frozen=True)
class Agreement:
    """One subset held against the one that the target's own statistics choose.

    Attributes:
        captured: its influence as a share of the other's.
        overlap: share of its elements that the other trains too.
    """

    captured: float
    overlap: float


def agreement(statistics: Statistics, method: ValuedMethod, reach: float, subset: Subset, best: Subset) -> Agreement:
    """Holds ``subset`` against ``best``, both of the model that ``statistics`` are of."""
    values = [_values(statistics, method, reach, one) for one in (subset, best)]
    mine, others = (_trained(statistics.groups, one) for one in (subset, best))
    shared = sum(float(np.minimum(a, b).sum()) for a, b in zip(mine, others, strict=True))
    trained = sum(float(a.sum()) for a in mine)
    return Agreement(values[0] / values[1] if values[1] else float("nan"), shared / trained if trained else 0.0)


def tensor_densities(statistics: Statistics, method: ValuedMethod, reach: float) -> np.ndarray:
    """float64 [P]: influence per element of every candidate."""
    groups = statistics.groups
    value = partial(method.value, reach=reach)
    totals = [statistics.values_of(index, value).sum(dtype=torch.float64) for index in range(len(groups.parameters))]
    return np.array(totals) / np.array([info.count for info in groups.parameters])


def uniform_subset(target: Groups, budget: int, scores: Scores) -> Subset:
    """Every tensor trains its share of ``budget`` by size, chosen inside as a transferred subset is."""
    sizes = np.array([info.count for info in target.parameters], dtype=np.int64)
    numbers = shares(sizes, budget)
    if target.granularity != "element":
        numbers = numbers // np.array([int(target.counts[target.span(i)][0]) for i in range(len(sizes))])
    return fill(target, Allotment(numbers, 0.0, 0.0, 0.0, "uniform", (), 1.0), scores)


def _values(statistics: Statistics, method: ValuedMethod, reach: float, subset: Subset) -> float:
    groups = statistics.groups
    if groups.granularity != "element":
        values = method.values(statistics.columns, reach)
        return float((values * (chosen_of(groups, subset) > 0)).sum())
    total = 0.0
    for shard in statistics.elements:
        part = subset.parts.get(groups.parameters[shard.slice.parameter].name)
        if part is not None:
            mask = part.mask(shard.slice.start, shard.slice.start + shard.slice.length)
            total += float(method.value(shard.columns, reach)[mask].double().sum())
    return total


def _trained(groups: Groups, subset: Subset) -> list[np.ndarray]:
    """What ``subset`` trains of each group, or of each element, in elements."""
    if groups.granularity != "element":
        return [chosen_of(groups, subset)]
    return [
        subset.parts[info.name].mask().numpy().astype(np.int64)
        if info.name in subset.parts
        else np.zeros(info.count, dtype=np.int64)
        for info in groups.parameters
    ]

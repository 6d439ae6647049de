"""Evaluation of a transferred subset against statistics of the target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from adapeft.choose.elements import shares
from adapeft.choose.knapsack import chosen_of
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import Plan, ValuedMethod
from adapeft.methods.random.method import random_subset
from adapeft.parts.part import mask_of
from adapeft.subset.subset import Subset
from adapeft.transfer.transfer import Allotment, Scores, fill

_RANDOM_SUBSETS = 10


@dataclass(frozen=True)
class Agreement:
    """Agreement of a subset with the one chosen from the target's own statistics.

    Attributes:
        captured: its influence as a fraction of that of the other.
        overlap: fraction of its elements that the other also trains.
    """

    captured: float
    overlap: float


def agreement(statistics: Statistics, method: ValuedMethod, reach: float, subset: Subset, best: Subset) -> Agreement:
    """Compare ``subset`` with ``best``, both of the model to which ``statistics`` belong."""
    values = [_values(statistics, method, reach, one) for one in (subset, best)]
    mine, others = (_trained(statistics.groups, one) for one in (subset, best))
    shared = sum(float(np.minimum(a, b).sum()) for a, b in zip(mine, others, strict=True))
    trained = sum(float(a.sum()) for a in mine)
    return Agreement(values[0] / values[1] if values[1] else float("nan"), shared / trained if trained else 0.0)


def tensor_densities(statistics: Statistics, method: ValuedMethod, reach: float) -> np.ndarray:
    """Return the influence per element of every candidate, float64 [P]."""
    groups = statistics.groups
    value = partial(method.value, reach=reach)
    totals = [statistics.values_of(index, value).sum(dtype=torch.float64) for index in range(len(groups.parameters))]
    return np.array(totals) / np.array([info.count for info in groups.parameters])


def uniform_subset(target: Groups, budget: int, scores: Scores) -> Subset:
    """Return the subset in which every tensor gets a share of ``budget`` in proportion to its size.

    Within a tensor, the rows or elements of largest ``scores`` are chosen, as for a transferred subset.
    """
    sizes = np.array([info.count for info in target.parameters], dtype=np.int64)
    numbers = shares(sizes, budget)
    if target.granularity != "element":
        numbers = numbers // np.array([int(target.counts[target.span(i)][0]) for i in range(len(sizes))])
    return fill(target, Allotment(numbers, 0.0, 0.0, 0.0, "uniform", (), 1.0), scores)


def random_subsets(target: Groups, plan: Plan) -> list[Subset]:
    """Return random subsets under the plan's budget, one for each of several seeds."""
    return [random_subset(target, replace(plan, seed=seed)) for seed in range(_RANDOM_SUBSETS)]


def _values(statistics: Statistics, method: ValuedMethod, reach: float, subset: Subset) -> float:
    groups = statistics.groups
    if groups.granularity != "element":
        values = method.values(statistics.columns, reach)
        return float((values * (chosen_of(groups, subset) > 0)).sum())
    total = 0.0
    for shard in statistics.elements:
        piece = shard.slice
        part = subset.parts.get(groups.parameters[piece.parameter].name)
        if part is not None:  # otherwise the columns of factored shards need not be computed
            mask = part.mask(piece.start, piece.start + piece.length)
            total += float(method.value(shard.columns, reach)[mask].double().sum())
    return total


def _trained(groups: Groups, subset: Subset) -> list[np.ndarray]:
    """Return the number of elements that ``subset`` trains of each group, or of each single element."""
    if groups.granularity != "element":
        return [chosen_of(groups, subset)]
    return [mask_of(subset.parts.get(info.name), 0, info.count).numpy().astype(np.int64) for info in groups.parameters]

"""Random: the baseline no selector may skip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adapeft.choose.groups import parts_of
from adapeft.choose.subset import Part, Subset
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.method import Method, Plan
from adapeft.ranks import Ranks

if TYPE_CHECKING:
    from adapeft.config import Select


class Random(Method):
    """A uniform draw under the budget, made once: exactly that many elements, or groups in random order while they fit.

    Fu et al. 2023, "Random". A mask that may fall on word embeddings wastes half its budget there: exclude them for a
    baseline that means something.
    """

    name = "random"
    family = "random"
    summary = "a uniform draw of elements or groups"
    cost = "nothing"
    source = "Fu et al. 2023"

    def measure(self, passes: Passes, groups: Groups, settings: Select) -> Statistics:
        return Statistics(groups, {})

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan, ranks: Ranks) -> Subset:
        draw = np.random.default_rng([plan.seed, 2])
        subset = (
            _elements(groups, plan.budget, draw) if groups.granularity == "element" else _groups(groups, plan, draw)
        )
        return subset.described(status="drawn", num_groups=_population(groups))


def _population(groups: Groups) -> int:
    return int(groups.counts.sum()) if groups.granularity == "element" else groups.num_groups


def _elements(groups: Groups, budget: int, draw: np.random.Generator) -> Subset:
    chosen = np.sort(draw.choice(_population(groups), budget, replace=False, shuffle=False))
    starts = np.concatenate([[0], np.cumsum([info.count for info in groups.parameters])])
    cuts = np.searchsorted(chosen, starts)
    return Subset(
        {
            info.name: Part("elements", info.shape, torch.from_numpy(chosen[cuts[i] : cuts[i + 1]] - starts[i]))
            for i, info in enumerate(groups.parameters)
            if cuts[i + 1] > cuts[i]
        }
    ).described(num_chosen=budget)


def _groups(groups: Groups, plan: Plan, draw: np.random.Generator) -> Subset:
    mask = np.zeros(groups.num_groups, dtype=bool)
    left = plan.budget
    for group in draw.permutation(groups.num_groups):
        if groups.counts[group] <= left:
            mask[group] = True
            left -= int(groups.counts[group])
    return Subset(parts_of(groups, mask)).described(num_chosen=int(mask.sum()))

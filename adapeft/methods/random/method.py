"""Random: the baseline for every method."""

from __future__ import annotations

from typing import Any

import numpy as np

from adapeft.choose.draw import draw_elements, drawing_bytes, fitting
from adapeft.choose.elements import subset_at
from adapeft.choose.knapsack import most_valuable, parts_of
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import Plan, UnmeasuredMethod
from adapeft.methods.random.options import RandomOptions
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset


class Random(UnmeasuredMethod[RandomOptions]):
    """A uniform draw within the budget before training: exactly that many elements, or groups in random order that fit.

    Fu et al. 2023, "Random". A mask that can fall on word embeddings wastes half its budget there; exclude them for a
    meaningful baseline.
    """

    options = RandomOptions
    family = "random"
    summary = "a uniform draw of elements or groups"
    source = "Fu et al. 2023"

    def drawing_bytes(self, groups: Groups, budget: int) -> int:
        return drawing_bytes(int(groups.starts[-1]), budget) if groups.granularity == "element" else 0

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[RandomOptions], ranks: Ranks) -> Subset:
        return random_subset(groups, plan)


def random_subset(groups: Groups, plan: Plan[Any]) -> Subset:
    """Return a uniform draw within the plan's budget with the plan's seed."""
    if groups.granularity == "element":
        drawn = subset_at(groups, draw_elements(groups, plan.budget, plan.seed))
    else:
        drawn = _draw_groups(groups, plan)
    return drawn.described(status="drawn")


def _draw_groups(groups: Groups, plan: Plan[Any]) -> Subset:
    order = np.random.default_rng([plan.seed, 2]).permutation(groups.num_groups)
    possible = most_valuable(groups, -np.argsort(order), plan.most_rows)  # the first ones of each matrix
    mask = fitting(order[possible[order]], groups.counts if plan.costs is None else plan.costs, plan.budget)
    return Subset(parts_of(groups, mask)).described(num_groups=groups.num_groups, num_chosen=int(mask.sum()))

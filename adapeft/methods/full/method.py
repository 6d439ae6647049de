"""Full fine-tuning: the reference for every budget."""

from __future__ import annotations

import numpy as np

from adapeft.choose.knapsack import parts_of
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import Plan, UnmeasuredMethod
from adapeft.methods.full.options import FullOptions
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset


class Full(UnmeasuredMethod[FullOptions]):
    """Every candidate as a whole tensor; the budget does not apply."""

    options = FullOptions
    family = "none"
    summary = "all parameters, regardless of the budget"
    source = "the reference"
    is_budgeted = False

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[FullOptions], ranks: Ranks) -> Subset:
        everything = np.ones(groups.num_groups, dtype=bool)
        return Subset(parts_of(groups, everything)).described(
            status="all", num_groups=groups.num_groups, num_chosen=groups.num_groups
        )

"""Full fine-tuning: what every budget is compared with."""

from __future__ import annotations

import numpy as np

from adapeft.choose.knapsack import parts_of
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import Method, Plan
from adapeft.methods.full.options import FullOptions
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset


class Full(Method[FullOptions]):
    """Every candidate as a whole tensor; the budget does not apply."""

    options = FullOptions
    family = "none"
    summary = "all parameters, whatever the budget"
    cost = "nothing"
    source = "the reference"
    measures_loss = False
    is_budgeted = False

    def measure(self, passes: Passes, groups: Groups, settings: FullOptions) -> Statistics:
        return Statistics(groups, {})

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[FullOptions], ranks: Ranks) -> Subset:
        everything = np.ones(groups.num_groups, dtype=bool)
        return Subset(parts_of(groups, everything)).described(
            status="all", num_groups=groups.num_groups, num_chosen=groups.num_groups
        )

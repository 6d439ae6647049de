"""AdaPEFT: influence from gradient and curvature, chosen by a knapsack."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from adapeft.choose.joint import choose_groups_jointly, with_joint_value
from adapeft.choose.joint_elements import choose_elements_jointly, choose_fewest_jointly
from adapeft.choose.options import choose_options
from adapeft.errors import AdapeftError
from adapeft.measure.direction import measure_direction
from adapeft.measure.exact.elementwise import measure_elements
from adapeft.measure.exact.parabola import measure_parabolas
from adapeft.measure.exact.probe import measure_along_probe
from adapeft.measure.groups import Groups
from adapeft.measure.influence import influence
from adapeft.measure.low_rank.direction import measure_direction_of_low_rank
from adapeft.measure.low_rank.elements import measure_direction_of_elements, measure_elements_of_low_rank
from adapeft.measure.low_rank.windows import SeenShards
from adapeft.measure.options import measure_with_options
from adapeft.measure.passes import Passes
from adapeft.measure.projections import measure_projections
from adapeft.measure.statistics import Statistics
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.base.method import Plan, ValuedMethod
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset


class AdaPEFT(ValuedMethod[AdaPEFTOptions]):
    """The groups of largest predicted loss decrease within the reach of training.

    Xu and Bu, "Adaptive parameter-efficient fine-tuning via Hessian-informed subset selection", 2025, with a limited
    reach, rows as groups, and curvature from sampled labels. Their settings are ``reach: inf``, ``groups: role``,
    ``curvature: parabola``, ``solver: greedy``, and ``probe_steps`` of a tenth of the training.
    """

    options = AdaPEFTOptions
    family = "second-order"
    summary = "groups of largest influence under the budget"
    cost = "three backward passes, or four through windows"
    source = "Xu and Bu 2025"
    default_warmup_steps = 96

    def check(self, groups: Groups, budget: int, settings: AdaPEFTOptions) -> None:
        if groups.is_quantized and self.window_rank(groups, settings) is None:
            name = next(info.name for info in groups.parameters if info.is_quantized)
            raise AdapeftError(
                f"select.{settings.displacing or 'measure = exact'} needs the gradient of every single element, but "
                f"{name!r} and others are quantized and have none. Measure with low rank (the default there), leave "
                f"quantized matrices out with select.exclude, or load the model without quantization."
            )

    def samples_labels(self, settings: AdaPEFTOptions) -> bool:
        return settings.curvature == "sampled-labels"

    def measure(self, passes: Passes, groups: Groups, settings: AdaPEFTOptions) -> Statistics:
        if settings.probe_steps:
            return measure_along_probe(passes, groups, settings, lambda: self._measure_here(passes, groups, settings))
        return self._measure_here(passes, groups, settings)

    def _measure_here(self, passes: Passes, groups: Groups, settings: AdaPEFTOptions) -> Statistics:
        """Return the statistics at the current weights."""
        by_element = groups.granularity == "element"
        passes.warm_up(passes.calibration.half_a)
        if isinstance(passes.shards, SeenShards):
            if by_element:
                return self._measure_factors(passes, groups, settings)
            direction = measure_direction_of_low_rank(passes, settings.direction)
            steps = passes.shards.windows.groups
        else:
            direction = measure_direction(passes, settings.direction)
            steps = groups
        passes.warm_up(passes.calibration.half_b)
        if by_element:
            return measure_elements(passes, groups, direction, shrinkage=settings.shrinkage)
        if settings.options:
            kinds, ranks = settings.options, settings.lora_ranks
            columns, options = measure_with_options(passes, groups, direction, kinds, ranks, steps)
            return Statistics(groups, columns, options=options)
        if settings.curvature == "parabola":
            return Statistics(groups, measure_parabolas(passes, groups, direction))
        columns = measure_projections(passes, steps, direction)
        if settings.probe_steps:
            del columns["projections"]  # there are no cross terms along a probe
        return Statistics(groups, columns)

    def _measure_factors(self, passes: Passes, groups: Groups, settings: AdaPEFTOptions) -> Statistics:
        """Return the statistics of single elements through windows, after the warm-up for half A."""
        direction = measure_direction_of_elements(passes, settings.direction)
        passes.warm_up(passes.calibration.half_b)
        return measure_elements_of_low_rank(passes, groups, direction, shrinkage=settings.shrinkage)

    def statistics_bytes(self, settings: AdaPEFTOptions, num_micro: int) -> int:
        batch = 0 if num_micro == 1 else 4  # the gradient that is squared
        averages = 8 + batch if settings.direction == "adam" else 4  # of half A: gradients, and their squares
        if settings.granularity == "element":
            averages = 12 + batch  # of half B: the direction, gradients, squares
        elif settings.curvature == "parabola":
            averages = 8  # the direction and the original weights
        if not settings.probe_steps:
            return averages
        columns = 8 * settings.probe_points if settings.granularity == "element" else 0
        return averages + columns + 16  # the original weights, the trained weights, Adam's moments

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[AdaPEFTOptions], ranks: Ranks) -> Subset:
        jointly = plan.settings.chooses_jointly
        if jointly and groups.granularity == "element":
            return choose_elements_jointly(groups, statistics.elements, plan.budget, plan.reach, ranks)
        if jointly:
            return choose_groups_jointly(groups, statistics.columns, plan.budget, plan.reach, most_rows=plan.most_rows)
        return with_joint_value(self._choose_one_by_one(groups, statistics, plan, ranks), statistics, plan.reach)

    def _choose_one_by_one(
        self, groups: Groups, statistics: Statistics, plan: Plan[AdaPEFTOptions], ranks: Ranks
    ) -> Subset:
        if statistics.options is not None:
            return choose_options(
                groups,
                self.group_values(statistics, plan.reach),
                statistics.options,
                self.option_values(statistics, plan.reach),
                plan.budget,
                kinds=plan.settings.options,
                greedy=plan.settings.solver == "greedy",
                most_rows=plan.most_rows,
            )
        return super().choose(groups, statistics, plan, ranks)

    def choose_fewest(
        self, groups: Groups, statistics: Statistics, plan: Plan[AdaPEFTOptions], best: Subset, ranks: Ranks
    ) -> Subset:
        if plan.settings.chooses_jointly and groups.granularity == "element":
            return choose_fewest_jointly(groups, statistics.elements, best, plan.reach, ranks)
        return super().choose_fewest(groups, statistics, plan, best, ranks)

    def option_values(self, statistics: Statistics, reach: float) -> np.ndarray:
        assert statistics.options is not None
        columns = {"slope": statistics.options.slopes, "curvature": statistics.options.curvatures}
        return self.values(columns, reach)

    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        values = influence(columns["slope"], columns["curvature"], reach)
        # The mean over a probe's points […, P] gives the same order as their sum, and is still a loss decrease.
        return values.mean(dim=1) if values.ndim == 2 else values

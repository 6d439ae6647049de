"""Methods that train everything under a rule instead of choosing beforehand."""

from __future__ import annotations

from typing import TypeVar

from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import Plan, UnmeasuredMethod
from adapeft.methods.base.options import RuleOptions
from adapeft.methods.base.rule import describe_rule
from adapeft.parts.dense import Dense
from adapeft.parts.rule import Rule
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset

Options = TypeVar("Options", bound=RuleOptions)


class RuleMethod(UnmeasuredMethod[Options]):
    """A method that measures nothing: every candidate becomes a dense part, and its rule decides while training.

    Under a budget that is what the shipped model may differ in; while training, every candidate costs a weight's
    memory and an optimizer's state.

    Attributes:
        rule: what decides.
    """

    rule: type[Rule[Options]]

    cost = "nothing; training holds a weight and an optimizer's state for every candidate"

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[Options], ranks: Ranks) -> Subset:
        budget = plan.budget if self.is_budgeted else None
        population = int(groups.counts.sum())
        return Subset({info.name: Dense(info.shape) for info in groups.parameters}).described(
            rule=describe_rule(plan.settings, plan.seed, budget),
            status="decided while training",
            num_groups=population,
            num_chosen=population if budget is None else budget,
        )

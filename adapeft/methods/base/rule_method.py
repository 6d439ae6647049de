"""Methods that train all candidates under a rule instead of choosing before training."""

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
    """A method that measures nothing: every candidate becomes a dense part, and its rule decides during training.

    A budget limits the elements in which the shipped model differs from the base. During training, every candidate
    needs memory for a weight and its optimizer state.

    Attributes:
        rule: class of the rule.
    """

    rule: type[Rule[Options]]

    cost = "nothing; training keeps a weight and optimizer state for every candidate"

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[Options], ranks: Ranks) -> Subset:
        budget = plan.budget if self.is_budgeted else None
        population = int(groups.counts.sum())
        return Subset({info.name: Dense(info.shape) for info in groups.parameters}).described(
            rule=describe_rule(plan.settings, plan.seed, budget),
            status="decided while training",
            num_groups=population,
            num_chosen=population if budget is None else budget,
        )

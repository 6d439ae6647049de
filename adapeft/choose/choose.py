"""From statistics to a subset under the budget, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapeft.choose.subset import Subset
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods import Plan, get_method
from adapeft.ranks import Ranks

if TYPE_CHECKING:
    from adapeft.config import Select


def choose(settings: Select, statistics: Statistics, *, reach: float, seed: int, ranks: Ranks) -> Subset:
    """The subset of ``settings.method`` under ``settings.budget``, the same on every rank. Collective.

    Raises:
        AdapeftError: the budget does not fit the groups.
    """
    groups = statistics.groups
    plan = Plan(check_budget(groups, settings), reach, seed, settings)
    subset = get_method(settings.method).choose(groups, statistics, plan, ranks)
    return subset.of_model(groups.always_train, groups.new).described(
        method=settings.method,
        granularity=groups.granularity,
        budget=plan.budget,
        num_total=groups.num_total,
        reach=reach,
        seed=seed,
        fingerprint=groups.fingerprint,
    )


def check_budget(groups: Groups, settings: Select) -> int:
    """The budget in elements: everything, where the method knows no budget.

    Raises:
        AdapeftError: nothing to choose from, above the candidates, below the cheapest group, or not to be kept by the
            method.
    """
    method, budget = get_method(settings.method), settings.budget
    available = int(groups.counts.sum())
    if not available:
        raise AdapeftError(
            "select.include, select.exclude and select.always_train leave no parameter to choose. Narrow them."
        )
    if not method.is_budgeted:
        return available
    limit = budget.number or budget.count(groups.num_total)
    if method.adds_parameters:  # the candidates' own sizes do not matter
        method.check(groups, limit, settings)
        return limit
    if limit > available:
        raise AdapeftError(
            f"select.budget = {budget} is {limit:,} parameters, more than the {available:,} there are to choose from. "
            f"Lower it, or widen select.include and select.exclude."
        )
    cheapest = 1 if groups.granularity == "element" else int(groups.counts.min())
    if limit < cheapest:
        raise AdapeftError(
            f"select.budget = {budget} is {limit:,} parameters, less than the cheapest {groups.granularity} group "
            f"({cheapest:,}). Raise it, or choose a finer select.groups: row or element."
        )
    method.check(groups, limit, settings)
    return limit

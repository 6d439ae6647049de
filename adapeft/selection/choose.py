"""From statistics to a subset under the budget, and what is said of it."""

from __future__ import annotations

import math

from adapeft.errors import AdapeftError
from adapeft.files.json_numbers import infinity_in_words
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.memory.limit import MemoryLimit
from adapeft.methods.base.options import ValuedOptions
from adapeft.methods.registry import Plan, get_method
from adapeft.ranks import Ranks
from adapeft.sections.select import Select
from adapeft.subset.empty import or_random
from adapeft.subset.subset import Subset


def choose(
    settings: Select,
    statistics: Statistics,
    *,
    reach: float,
    seed: int,
    ranks: Ranks,
    limit: MemoryLimit | None = None,
) -> Subset:
    """The subset of ``settings.method`` within the budget, the same on every rank. Collective.

    It may be empty, where no group promises a lower loss and ``settings.if_empty`` is ``error``; ``check_not_empty``
    refuses that.

    Args:
        settings: the config's section.
        statistics: what was measured.
        reach: of the training to come.
        seed: of random draws.
        ranks: who holds the statistics.
        limit: what ``settings.memory_per_device`` comes to; it then is the budget.

    Raises:
        AdapeftError: the budget does not fit the groups, or what they are worth is not finite.
    """
    groups = statistics.groups
    if limit is None:
        plan = Plan(check_budget(groups, settings), reach, seed, settings)
    else:
        plan = _plan_in_bytes(groups, settings, limit, reach, seed)
    subset = get_method(settings.method).choose(groups, statistics, plan, ranks)
    _check_value(subset, reach)
    if isinstance(settings, ValuedOptions) and settings.if_empty == "random":
        subset = or_random(subset, lambda: get_method("random").choose(groups, statistics, plan, ranks))
    if groups.unreached:
        subset = subset.described(unreached=list(groups.unreached))
    if limit is not None:
        subset = subset.described(memory_per_device=limit.limit, memory_bytes=limit.price_of(subset))
    return subset.of_model(groups.always_train, groups.new).described(
        method=settings.method,
        granularity=groups.granularity,
        budget=plan.budget if limit is None else subset.count,
        num_total=groups.num_total,
        reach=infinity_in_words(reach),
        seed=seed,
        fingerprint=groups.fingerprint,
    )


def _check_value(subset: Subset, reach: float) -> None:
    for key in ("value", "bound", "gap"):
        number = getattr(subset.choice, key)
        if number is not None and not math.isfinite(number):
            raise AdapeftError(
                f"the {key} of the choice is {number:g}: the statistics, or select.reach = {reach:g}, are too large to "
                f"compute influence with. Lower select.reach, and check the scale of the targets."
            )


def check_limit(groups: Groups, settings: Select, limit: MemoryLimit) -> int:
    """The elements that there is room for, about.

    Raises:
        AdapeftError: nothing to choose from, or not room enough for the cheapest group.
    """
    _available(groups)
    cheapest = limit.leaf if groups.granularity == "element" else int(limit.costs(groups).min())
    if cheapest > limit.room:
        raise AdapeftError(
            f"select.memory_per_device leaves {limit.room:,} bytes for what is trained, less than the cheapest "
            f"{groups.granularity} group takes ({cheapest:,.0f}). Raise it, or choose a finer select.groups: row or "
            f"element."
        )
    elements = limit.num_elements(groups)
    get_method(settings.method).check(groups, elements, settings)
    return elements


def _plan_in_bytes(groups: Groups, settings: Select, limit: MemoryLimit, reach: float, seed: int) -> Plan:
    elements = check_limit(groups, settings, limit)
    if groups.granularity == "element":  # all cost the same
        return Plan(elements, reach, seed, settings)
    return Plan(limit.room, reach, seed, settings, limit.costs(groups))


def _available(groups: Groups) -> int:
    available = int(groups.counts.sum())
    if not available:
        raise AdapeftError(
            "select.include, select.exclude and select.always_train leave no parameter to choose. Narrow them."
        )
    return available


def check_budget(groups: Groups, settings: Select) -> int:
    """The budget in elements: everything, where the method knows no budget.

    Raises:
        AdapeftError: nothing to choose from, above the candidates, below the cheapest group, or not to be kept by the
            method.
    """
    method, budget = get_method(settings.method), settings.budget
    if settings.memory_per_device is not None:
        raise AdapeftError(
            "select.memory_per_device: only adapeft select, run and train know what a device holds. Give select.budget."
        )
    available = _available(groups)
    if not method.is_budgeted:
        return available
    limit = budget.number or budget.count(groups.num_total)
    if method.adds_parameters:  # the candidates' own sizes do not matter
        method.check(groups, limit, settings)
        return limit
    if limit > available:
        left_out = f" ({', '.join(groups.unreached)} received no gradient)" if groups.unreached else ""
        raise AdapeftError(
            f"select.budget = {budget} is {limit:,} parameters, more than the {available:,} there are to choose from"
            f"{left_out}. Lower it, or widen select.include and select.exclude."
        )
    cheapest = 1 if groups.granularity == "element" else int(groups.counts.min())
    if limit < cheapest:
        raise AdapeftError(
            f"select.budget = {budget} is {limit:,} parameters, less than the cheapest {groups.granularity} group "
            f"({cheapest:,}). Raise it, or choose a finer select.groups: row or element."
        )
    method.check(groups, limit, settings)
    return limit

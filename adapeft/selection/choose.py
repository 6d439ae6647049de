"""Choice of a subset from statistics within the budget, and its description."""

from __future__ import annotations

import math

from adapeft.choose.elements import filled_by_draw
from adapeft.errors import AdapeftError
from adapeft.files.json_numbers import infinity_in_words
from adapeft.measure.directions import Directions, measure_directions
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.reliability import reliability_of
from adapeft.measure.statistics import Statistics
from adapeft.memory.limit import MemoryLimit
from adapeft.methods.base.options import ValuedOptions
from adapeft.methods.random.method import random_subset
from adapeft.methods.registry import Plan, get_method
from adapeft.ranks import Ranks
from adapeft.sections.select import Select
from adapeft.subset.choice import Choice
from adapeft.subset.empty import or_random
from adapeft.subset.subset import Subset
from adapeft.subset.verdict import is_noise


def choose(
    settings: Select,
    statistics: Statistics,
    *,
    reach: float,
    seed: int,
    ranks: Ranks,
    limit: MemoryLimit | None = None,
) -> Subset:
    """Choose the subset of ``settings.method`` within the budget, the same on every rank. Collective.

    It may be empty if no group promises a lower loss and ``settings.if_empty`` is ``error``; ``check_not_empty``
    refuses such a subset.

    Args:
        settings: ``select`` section of the config.
        statistics: measured statistics.
        reach: reach of the planned training.
        seed: random seed of draws.
        ranks: ranks that hold the statistics.
        limit: memory limit from ``settings.memory_per_device``, which replaces the budget.

    Raises:
        AdapeftError: the budget does not fit the groups, or a value is not finite.
    """
    groups = statistics.groups
    if limit is None:
        plan = Plan(check_budget(groups, settings), reach, seed, settings)
    else:
        plan = _plan_in_bytes(groups, settings, limit, reach, seed)
    method, reliability = get_method(settings.method), reliability_of(statistics, ranks)
    subset = method.choose(groups, statistics, plan, ranks)
    _check_value(subset, reach)
    budget = plan.budget
    if is_noise(reliability):
        # On CoLA what noise chooses is behind a draw (tests/benchmarks/results/verdict.md).
        if settings.draws_for_noise and subset.count:
            subset = random_subset(groups, plan)
    elif settings.budget.is_auto and subset.choice.value and not settings.fills:
        most = subset.choice.value
        subset = method.choose_fewest(groups, statistics, plan, subset, ranks)
        budget = subset.count
        subset = subset.described(
            share=subset.choice.needed("value") / most, unspent=None if subset.choice.unspent is None else 0
        )
    if isinstance(settings, ValuedOptions) and settings.if_empty == "random":
        subset = or_random(subset, lambda: random_subset(groups, plan))
    if groups.unreached:
        subset = subset.described(unreached=list(groups.unreached))
    if reliability is not None:
        subset = subset.described(reliability=reliability)
    subset = subset.of_model(groups.always_train, groups.new).described(
        method=settings.method,
        granularity=groups.granularity,
        budget=budget,
        num_total=groups.num_total,
        reach=infinity_in_words(reach),
        seed=seed,
        fingerprint=groups.fingerprint,
    )
    return _priced(subset, limit)


def judged(
    subset: Subset,
    passes: Passes,
    groups: Groups,
    settings: Select,
    seed: int,
    limit: MemoryLimit | None = None,
) -> Subset:
    """Return the subset with its directions, as far as they can be counted, and filled up. Collective.

    Args:
        subset: a subset that ``choose`` returned.
        passes: the passes of its measurement.
        groups: the candidates that it was chosen from.
        settings: ``select`` section of the config.
        seed: random seed of draws.
        limit: memory limit that replaced the budget.
    """
    is_countable = _is_by_slopes(subset.choice) and get_method(settings.method).samples_labels(settings)
    found = measure_directions(passes, groups, subset.parts) if is_countable else None
    return completed(groups, subset, found, settings, seed, limit)


def completed(
    groups: Groups,
    subset: Subset,
    found: Directions | None,
    settings: Select,
    seed: int,
    limit: MemoryLimit | None = None,
) -> Subset:
    """Return the subset described by its directions and, unless ``fill`` is false, filled up with a draw.

    A draw stays as it is. So does a choice that leaves nothing, or whose method spends all of the budget.
    """
    if found is not None and _is_by_slopes(subset.choice):
        subset = subset.described(directions=found.chosen, candidate_directions=found.candidates)
    return _priced(filled_by_draw(groups, subset, seed), limit) if settings.fills else subset


def _is_by_slopes(choice: Choice) -> bool:
    return choice.reliability is not None and not choice.is_drawn


def _priced(subset: Subset, limit: MemoryLimit | None) -> Subset:
    if limit is None:
        return subset
    return subset.described(memory_per_device=limit.limit, memory_bytes=limit.price_of(subset), budget=subset.count)


def _check_value(subset: Subset, reach: float) -> None:
    for key in ("value", "bound", "gap", "joint_value"):
        number = getattr(subset.choice, key)
        if number is not None and not math.isfinite(number):
            raise AdapeftError(
                f"the {key} of the choice is {number:g}: the statistics or select.reach = {reach:g} are too large to "
                f"compute influence. Lower select.reach, and check the scale of the targets."
            )


def check_limit(groups: Groups, settings: Select, limit: MemoryLimit) -> int:
    """Return the approximate number of elements that fit within the limit.

    Raises:
        AdapeftError: there are no candidates, or not even the cheapest group fits.
    """
    _available(groups)
    cheapest = limit.leaf if groups.granularity == "element" else int(limit.costs(groups).min())
    if cheapest > limit.room:
        raise AdapeftError(
            f"select.memory_per_device leaves {limit.room:,} bytes for trained parameters, less than the cheapest "
            f"{groups.granularity} group needs ({cheapest:,.0f}). Raise it, or set a finer select.groups: row or "
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
            "select.include, select.exclude and select.always_train leave no parameter to choose. Widen "
            "select.include, or narrow the other two."
        )
    return available


def check_budget(groups: Groups, settings: Select) -> int:
    """Return the budget in elements; all candidates for a method without a budget.

    Raises:
        AdapeftError: there are no candidates, or the budget exceeds them, is below the cheapest group, or cannot be
            kept by the method.
    """
    method, budget = get_method(settings.method), settings.budget
    if settings.memory_per_device is not None:
        raise AdapeftError(
            "select.memory_per_device works only with the commands adapeft select, run and train, which know the "
            "memory of a device. Set select.budget instead."
        )
    available = _available(groups)
    if not method.is_budgeted:
        return available
    limit = budget.number or budget.count(groups.num_total)
    if method.adds_parameters:  # the candidates' own sizes do not matter
        method.check(groups, limit, settings)
        return limit
    if budget.is_auto:
        limit = min(limit, available)
    if limit > available:
        left_out = f" ({', '.join(groups.unreached)} received no gradient)" if groups.unreached else ""
        raise AdapeftError(
            f"select.budget = {budget} is {limit:,} parameters, more than the {available:,} candidates{left_out}. "
            f"Lower it, or admit more candidates in select.include and select.exclude."
        )
    cheapest = 1 if groups.granularity == "element" else int(groups.counts.min())
    if limit < cheapest:
        raise AdapeftError(
            f"select.budget = {budget} is {limit:,} parameters, less than the cheapest {groups.granularity} group "
            f"({cheapest:,}). Raise it, or set a finer select.groups: row or element."
        )
    method.check(groups, limit, settings)
    return limit

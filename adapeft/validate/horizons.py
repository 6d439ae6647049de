"""How long a choice stays good: what one point of a training run chooses, held against what a later one would."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from adapeft.errors import AdapeftError
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.methods.registry import Plan, ValuedMethod, get_method
from adapeft.ranks import OneRank
from adapeft.subset.empty import reason
from adapeft.subset.subset import Subset
from adapeft.transfer.verify import agreement, tensor_densities, uniform_subset

_RANDOM_DRAWS = 10


def across_horizons(statistics: Statistics, method: ValuedMethod, plan: Plan) -> dict[str, Any]:
    """Chooses at every point of a probe alone, and says what each choice is worth at every other point.

    The points share their calibration examples: what differs is the training between them, not the draw.

    Args:
        statistics: measured along a probe, columns [K, P].
        method: that measured them.
        plan: budget and reach of every choice.

    Returns:
        ``captured`` and ``overlap``, both [P, P]: of the subset chosen at the row's point, the share of influence, at
        the column's point, of the best there, and of elements that the best trains too. ``density_correlation``
        [P, P]: Spearman's, over tensors (over groups by ``role``). ``random`` (the mean of ten draws), and ``uniform``
        where there is anything to choose inside a tensor (there the first point's best): captured and overlap [P].
        A number of a point where nothing is worth choosing is None.

    Raises:
        AdapeftError: nothing is worth choosing at any point.
    """
    num_points = next(iter(statistics.columns.values())).shape[1]
    points = [at_point(statistics, point) for point in range(num_points)]
    chosen = [method.choose(statistics.groups, point, plan, OneRank()) for point in points]
    if not any(subset.count for subset in chosen):
        empty = chosen[0].described(method=method.name, granularity=statistics.groups.granularity, budget=plan.budget)
        raise AdapeftError(
            f"no choice to hold against others: {reason(empty)}, at any of the {num_points} points of the probe. Give "
            "another budget, or measure again with more examples (select.calibration)."
        )

    def held(subset: Subset) -> dict[str, list[float | None]]:
        """Against the best of every point."""
        found = [
            asdict(agreement(point, method, plan.reach, subset, best))
            for point, best in zip(points, chosen, strict=True)
        ]
        return {name: [_share(each[name]) for each in found] for name in found[0]}

    rows = [held(subset) for subset in chosen]
    draws = [held(_random(statistics, plan, seed)) for seed in range(_RANDOM_DRAWS)]
    densities = [_densities(point, method, plan.reach) for point in points]
    result: dict[str, Any] = {
        **{name: [row[name] for row in rows] for name in rows[0]},
        "density_correlation": [[_share(float(spearmanr(a, b).statistic)) for b in densities] for a in densities],
        "random": {
            name: [_mean([draw[name][point] for draw in draws]) for point in range(num_points)] for name in draws[0]
        },
    }
    if statistics.groups.granularity in ("row", "element"):
        value = partial(method.value, reach=plan.reach)
        result["uniform"] = held(
            uniform_subset(statistics.groups, plan.budget, partial(points[0].values_of, value=value))
        )
    return result


def at_point(statistics: Statistics, point: int) -> Statistics:
    """The statistics [K] of one point of a probe."""
    shards = tuple(
        ElementShard(shard.slice, {name: column[:, point] for name, column in shard.columns.items()})
        for shard in statistics.elements
    )
    columns = {name: column[:, point] for name, column in statistics.columns.items()}
    return Statistics(statistics.groups, columns, shards)


def _share(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: list[float | None]) -> float | None:
    """Of shares of one point's best, which all are None where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _random(statistics: Statistics, plan: Plan, seed: int) -> Subset:
    unmeasured = Statistics(statistics.groups, {})
    return get_method("random").choose(statistics.groups, unmeasured, replace(plan, seed=seed), OneRank())


def _densities(point: Statistics, method: ValuedMethod, reach: float) -> np.ndarray:
    if point.groups.granularity == "role":  # a group has several tensors, and no tensor a value of its own
        return method.values(point.columns, reach) / point.groups.counts
    return tensor_densities(point, method, reach)

"""Stability of a choice over training: the choice at one point of a run, compared with those at other points."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from adapeft.errors import AdapeftError
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.methods.registry import Plan, ValuedMethod
from adapeft.ranks import OneRank
from adapeft.subset.empty import reason
from adapeft.subset.subset import Subset
from adapeft.transfer.verify import agreement, random_subsets, tensor_densities, uniform_subset


def across_horizons(statistics: Statistics, method: ValuedMethod, plan: Plan) -> dict[str, Any]:
    """Choose at each point of a probe separately, and evaluate each choice at all other points.

    All points use the same calibration examples, so they differ only by the training between them.

    Args:
        statistics: statistics measured along a probe, columns [K, P].
        method: method that measured them.
        plan: budget and reach of every choice.

    Returns:
        ``captured`` and ``overlap``, both [P, P]: for the subset chosen at the row's point, its influence at the
        column's point as a fraction of that of the best choice there, and the fraction of its elements that the best
        choice also trains. ``density_correlation`` [P, P]: Spearman's, over tensors (over groups by ``role``).
        ``random`` (mean of several draws), and ``uniform`` if there is a choice within tensors (there, the best units
        of the first point): captured and overlap [P]. Values for a point where nothing is worth choosing are None.

    Raises:
        AdapeftError: nothing is worth choosing at any point.
    """
    num_points = next(iter(statistics.columns.values())).shape[1]
    points = [at_point(statistics, point) for point in range(num_points)]
    chosen = [method.choose(statistics.groups, point, plan, OneRank()) for point in points]
    if not any(subset.count for subset in chosen):
        empty = chosen[0].described(method=method.name, granularity=statistics.groups.granularity, budget=plan.budget)
        raise AdapeftError(
            f"there is no choice to compare with others: {reason(empty)}, at any of the {num_points} points of the "
            "probe. Set another budget, or measure again with more examples (select.calibration)."
        )

    def held(subset: Subset) -> dict[str, list[float | None]]:
        """Return the agreement of ``subset`` with the best choice at every point."""
        found = [
            asdict(agreement(point, method, plan.reach, subset, best))
            for point, best in zip(points, chosen, strict=True)
        ]
        return {name: [_share(each[name]) for each in found] for name in found[0]}

    rows = [held(subset) for subset in chosen]
    draws = [held(subset) for subset in random_subsets(statistics.groups, plan)]
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
    """Return the statistics [K] of one point of a probe."""
    shards = tuple(
        ElementShard(shard.slice, {name: column[:, point] for name, column in shard.columns.items()})
        for shard in statistics.elements
    )
    columns = {name: column[:, point] for name, column in statistics.columns.items()}
    return Statistics(statistics.groups, columns, shards)


def _share(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: list[float | None]) -> float | None:
    """Return the mean of fractions of one point's best choice, which are all None if there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _densities(point: Statistics, method: ValuedMethod, reach: float) -> np.ndarray:
    if point.groups.granularity == "role":  # a group has several tensors, which have no separate values
        return method.values(point.columns, reach) / point.groups.counts
    return tensor_densities(point, method, reach)

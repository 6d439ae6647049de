r"""Groups under a budget by their joint influence, which is below the sum if groups change the output alike.

The projections :math:`Z_{km} = \sqrt{T/M}\,\tilde g_{mk}^\top d_k` from which curvature is measured give every cross
term, :math:`A_{jk} \approx \sum_m Z_{jm} Z_{km}`, so the joint value of a set S of groups costs no more than their sum:

.. math:: v(S) = \max_{0 \le t \le τ} \; t\, b_S - \tfrac12 t^2 A_{SS}, \quad b_S = \sum_{k \in S} b_k,
          \quad A_{SS} = \sum_m \Big(\sum_{k \in S} Z_{km}\Big)^2
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from adapeft.choose.knapsack import check_values, chosen_of, knapsack, most_valuable, parts_of
from adapeft.choose.options import options_of
from adapeft.measure.groups import Groups
from adapeft.measure.influence import influence
from adapeft.measure.statistics import Statistics
from adapeft.subset.subset import Subset

_ROUNDS = 200
"""At most 1/200 of the budget is chosen per evaluation of all gains, so the cost is K·M·200 for every budget."""


def choose_groups_jointly(
    groups: Groups,
    columns: Mapping[str, np.ndarray],
    budget: int,
    reach: float,
    *,
    most_rows: int | None = None,
) -> Subset:
    """Return the better, by joint value, of the joint greedy choice and of the knapsack on single values.

    In the description, ``value`` is the joint value and ``additive_value`` the sum for the same set. ``bound`` is None:
    with cross terms of both signs there is no useful bound on the optimum. Of each matrix the choice is among its
    ``most_rows`` most valuable rows; None: among all.
    """
    slopes, projections = columns["slope"], columns["projections"]
    single = _value(slopes, columns["curvature"], reach)
    check_values(groups, single)
    possible = most_valuable(groups, single, most_rows)
    greedy = np.zeros_like(possible)
    greedy[possible] = choose_jointly(slopes[possible], projections[possible], groups.counts[possible], budget, reach)
    sets = {
        "joint greedy": greedy,
        "knapsack": knapsack(np.where(possible, single, 0.0), groups.counts, budget).chosen,
    }
    values = {name: joint_value(slopes[chosen], projections[chosen], reach) for name, chosen in sets.items()}
    best = max(values, key=lambda name: values[name])
    return Subset(parts_of(groups, sets[best])).described(
        value=values[best],
        additive_value=float(single[sets[best]].sum()),
        joint_values=values,
        bound=None,
        gap=None,
        status=best.replace(" ", "_"),
        num_groups=groups.num_groups,
        num_chosen=int(sets[best].sum()),
    )


def joint_value(slopes: np.ndarray, projections: np.ndarray, reach: float) -> float:
    """Return the predicted loss decrease of groups trained together.

    Args:
        slopes: b of each, float64 [n].
        projections: Z of each, float [n, M].
        reach: τ.
    """
    together = projections.sum(axis=0, dtype=np.float64)
    return float(_value(slopes.sum(keepdims=True), (together**2).sum(keepdims=True), reach)[0])


def with_joint_value(subset: Subset, statistics: Statistics, reach: float) -> Subset:
    """Return the subset described by the joint value of its groups and LoRA options, if their projections are known."""
    columns, options = statistics.columns, statistics.options
    if "projections" not in columns:
        return subset
    chosen = chosen_of(statistics.groups, subset) > 0
    slopes, projections = columns["slope"][chosen], columns["projections"][chosen]
    if options is not None:
        if options.projections is None:
            return subset
        # A matrix that is trained whole is counted by its rows.
        is_lora = (options_of(statistics.groups, options, subset) > 0) & (options.ranks > 0)
        slopes = np.concatenate([slopes, options.slopes[is_lora]])
        projections = np.concatenate([projections, options.projections[is_lora]])
    return subset.described(joint_value=joint_value(slopes, projections, reach))


def choose_jointly(
    slopes: np.ndarray, projections: np.ndarray, costs: np.ndarray, budget: int, reach: float
) -> np.ndarray:
    """Choose groups greedily by joint gain per cost; returns bool [K].

    Args:
        slopes: b, float64 [K].
        projections: Z, float [K, M].
        costs: int64 [K].
        budget: largest total cost.
        reach: τ.
    """
    chosen = np.zeros(len(slopes), dtype=bool)
    own = (projections.astype(np.float64) ** 2).sum(axis=1)
    together, slope, left = np.zeros(projections.shape[1]), 0.0, budget
    while True:
        curvature = float(together @ together)
        now = float(_value(np.array([slope]), np.array([curvature]), reach)[0])
        gain = _value(slope + slopes, curvature + 2 * (projections @ together) + own, reach) - now
        gain[chosen | (costs > left)] = 0.0
        if not (gain > 0).any():
            return chosen
        # Takes the best group and the next best ones up to the limit of a round; the next round includes their cross
        # terms.
        order = np.argsort(-gain / costs, kind="stable")
        order = order[gain[order] > 0]
        spent = np.cumsum(costs[order])
        taken = order[: max(1, int(np.searchsorted(spent, min(left, budget // _ROUNDS), side="right")))]
        chosen[taken] = True
        together += projections[taken].sum(axis=0, dtype=np.float64)
        slope += float(slopes[taken].sum())
        left -= int(costs[taken].sum())


def _value(slope: np.ndarray, curvature: np.ndarray, reach: float) -> np.ndarray:
    return influence(torch.from_numpy(slope), torch.from_numpy(curvature), reach).numpy()

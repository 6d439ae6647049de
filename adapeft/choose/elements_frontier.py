"""The frontier of single elements that are chosen jointly: least joint influence under many budgets at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from adapeft.measure.influence import influence
from adapeft.measure.statistics import ElementShard
from solver import Frontier

_EXACT = 100_000
"""Elements of largest slope, and as many of largest slope over the root of the curvature, that are kept one by one."""

_SAMPLE = 100_000
"""Approximate number of the other elements that are kept, each of which stands for several."""

_RUN = 2**21
"""Elements that are looked at at once. The shards of factored statistics have so many at most."""

_PRICES = 30
"""Number of prices in even steps, for budgets near that of the largest price, and the same number in even ratios: with
ratios of 1.2 alone, 1,088 elements of STS-B had 5 % less than their choice."""

_HALVINGS = 40


def elements_frontier(elements: Sequence[ElementShard], budgets: Sequence[int], reach: float) -> Frontier:
    r"""Return the values of ``adapeft.choose.joint_elements`` at each budget, up to the sampling of small elements.

    At a price λ of √A the elements of all budgets are prefixes of one order, by :math:`b - \lambda\sqrt A`, so one sort
    per price serves all budgets. The value of a budget is the best over the prices, and its bound the lowest. The best
    price is :math:`\tau\sum_S\sqrt A`, which is largest without a budget: bisection finds that, and a grid covers the
    prices below.

    Args:
        elements: shards that hold every candidate.
        budgets: numbers of elements, ascending.
        reach: reach τ of the planned training.
    """
    slopes, roots, weights = _thinned(elements)
    largest = _price_without_budget(slopes, weights * roots, roots, reach)
    shares = np.union1d(np.linspace(0, 1, _PRICES), np.geomspace(1e-3, 1, _PRICES))
    prices = shares * largest if largest else [0.0]
    limits = np.array(budgets, dtype=np.int64)
    values, costs = np.zeros(len(limits)), np.zeros(len(limits), dtype=np.int64)
    bounds = np.full(len(limits), np.inf)
    for price in prices:
        score = slopes - price * roots
        positive = np.flatnonzero(score > 0)
        order = positive[np.argsort(-score[positive], kind="stable")]
        cost, slope, root = (
            np.concatenate([[0], np.cumsum((weights * of)[order])]) for of in (np.ones_like(slopes), slopes, roots)
        )
        value = influence(torch.from_numpy(slope), torch.from_numpy(root**2), reach).numpy()
        ends = np.searchsorted(cost, limits, side="right") - 1
        # A shorter prefix may be better: another element adds curvature too.
        best = np.maximum.accumulate(np.where(value >= np.maximum.accumulate(value), np.arange(len(value)), 0))[ends]
        is_better = value[best] > values
        values[is_better], costs[is_better] = value[best][is_better], cost[best][is_better].astype(np.int64)
        bounds = np.minimum(bounds, (reach * (slope - price * root))[ends] + 0.5 * price**2)
    return Frontier(limits, values, np.maximum(bounds, values), costs, costs)


def _price_without_budget(slopes: np.ndarray, totals: np.ndarray, roots: np.ndarray, reach: float) -> float:
    low, high = 0.0, reach * float(totals.sum())  # the sum falls as its price rises
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        low, high = (price, high) if price < reach * float(totals[slopes > price * roots].sum()) else (low, price)
    return high


def _thinned(elements: Sequence[ElementShard]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return slopes, roots of curvatures and numbers of elements that each stands for, without negative slopes.

    Elements of large slope decide and are few: with every 36th of MiniLM's instead, the docstrings' frontier lacked a
    quarter of its value. One pass, in which a few million elements are in memory, since those of a model of 8 B
    parameters would take 64 GB.
    """
    every = max(1, sum(shard.slice.length for shard in elements) // (2 * _SAMPLE))  # about half of the slopes are > 0
    steepest, cheapest, sampled = _Largest(), _Largest(), [np.empty((3, 0))]
    count = 0
    for slopes, roots in _runs(elements):
        numbers = count + np.arange(len(slopes))
        found = np.stack([numbers, slopes, roots])
        steepest.add(found, slopes)
        cheapest.add(found, slopes / np.maximum(roots, np.finfo(np.float64).tiny))
        sampled.append(found[:, numbers % every == 0])
        count += len(slopes)
    kept, first = np.unique(np.concatenate([steepest.numbers, cheapest.numbers]), return_index=True)
    exact = np.concatenate([steepest.found, cheapest.found], axis=1)[:, first]
    others = np.concatenate(sampled, axis=1)
    others = others[:, ~np.isin(others[0], kept)]
    weights = np.repeat(np.array([1, every]), [exact.shape[1], others.shape[1]])
    _, slopes, roots = np.concatenate([exact, others], axis=1)
    return slopes, roots, weights


class _Largest:
    """The ``_EXACT`` elements of largest score among those that were added.

    Attributes:
        found: number, slope and root of each. float64 [3, n].
    """

    def __init__(self) -> None:
        self.found = np.empty((3, 0))
        self._scores = np.empty(0)
        self._least = -math.inf

    @property
    def numbers(self) -> np.ndarray:
        """Number of each. float64 [n]."""
        return self.found[0]

    def add(self, found: np.ndarray, scores: np.ndarray) -> None:
        """Add elements with their scores; see ``found``."""
        is_large = scores > self._least
        scores = np.concatenate([self._scores, scores[is_large]])
        found = np.concatenate([self.found, found[:, is_large]], axis=1)
        if len(scores) > _EXACT:
            largest = np.argpartition(-scores, _EXACT - 1)[:_EXACT]
            scores, found = scores[largest], found[:, largest]
            self._least = float(scores.min())
        self.found, self._scores = found, scores


def _runs(elements: Sequence[ElementShard]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the slopes above zero and the roots of their curvatures, up to ``_RUN`` elements at a time."""
    for shard in elements:
        columns = shard.columns
        for slope, curvature in zip(columns["slope"].split(_RUN), columns["curvature"].split(_RUN), strict=True):
            keeps = slope > 0
            yield slope[keeps].double().numpy(), curvature[keeps].double().clamp(min=0).sqrt().numpy()

"""Tests of the random baseline: exactly k elements, uniform, and a function of its seed."""

from __future__ import annotations

import numpy as np
import pytest

from adapeft.choose.knapsack import chosen_of
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.random.options import RandomOptions
from adapeft.methods.registry import Plan, get_method
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank

PARAMETERS = (
    ParameterInfo("linear", (5, 4), "linear", 0, 0.0, 0),
    ParameterInfo("bias", (5,), "bias", 0, 0.0, None),
    ParameterInfo("out", (3, 5), "out", 0, 0.0, 0),
)
# 99.9 % and 0.1 % quantiles of chi-square with 39 degrees of freedom.
TOO_EVEN, TOO_UNEVEN = 16.3, 72.1


def draw(granularity, budget, seed):
    groups = Groups(PARAMETERS, granularity, num_total=40)
    subset = get_method("random").choose(
        groups, Statistics(groups, {}), Plan(budget, 1.0, seed, RandomOptions(method="random")), OneRank()
    )
    return groups, subset


def flat_positions(subset):
    starts = {"linear": 0, "bias": 20, "out": 25}
    return np.concatenate([part.indices.numpy() + starts[name] for name, part in subset.parts.items()])


@pytest.mark.parametrize("budget", [1, 13, 40])
def test_exactly_as_many_elements_as_asked(budget):
    for seed in range(20):
        _, subset = draw("element", budget, seed)
        positions = flat_positions(subset)
        assert subset.count == budget == len(set(positions.tolist()))
        assert positions.tolist() == sorted(positions.tolist())
        assert all(part.indices.max() < np.prod(part.shape) for part in subset.parts.values())


def test_every_element_is_as_likely():
    num_draws, k, n = 2000, 10, 40
    counts = sum(np.bincount(flat_positions(draw("element", k, seed)[1]), minlength=n) for seed in range(num_draws))
    expected = num_draws * k / n
    # Draws without replacement have a smaller variance than a multinomial, by a factor of (n − k) / (n − 1).
    chi_square = ((counts - expected) ** 2).sum() / expected * (n - 1) / (n - k)
    assert TOO_EVEN < chi_square < TOO_UNEVEN


def test_every_group_is_as_likely_and_the_rest_of_the_budget_is_used():
    num_draws, hits = 500, 0
    for seed in range(num_draws):
        groups, subset = draw("row", 13, seed)
        chosen = chosen_of(groups, subset) > 0
        hits = hits + chosen
        assert subset.count <= 13
        assert 13 - subset.count < groups.counts[~chosen].min(), "another group would have fitted"
    rows = hits[:5]
    assert np.abs(rows - rows.mean()).max() < 5 * np.sqrt(rows.mean())
    assert hits.min() > 0


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_depends_on_the_seed_alone(granularity):
    def picks(seed):
        return {name: part.indices for name, part in draw(granularity, 12, seed)[1].parts.items()}

    same, again, other = picks(1), picks(1), picks(2)
    assert repr(same) == repr(again)
    assert repr(same) != repr(other)

"""Tests of the value that a choice at one point of training has at another, against figures worked out in numpy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from adapeft.config.load import parse_select
from adapeft.measure.groups import build_groups
from adapeft.measure.measure import measure
from adapeft.measure.shards.shards import WholeModel
from adapeft.measure.statistics import Statistics
from adapeft.methods.registry import Plan, get_method
from adapeft.validate.horizons import across_horizons
from tests.on_ranks.statistics import passes_for
from tests.support.tiny import make_bert

METHOD = get_method("adapeft")
REACH = 0.5
SIX = ["*layer.0.attention.self*"]


def of_groups(granularity, num_points, include=()):
    """Return statistics of seeded noise; without curvature, the value of a group is reach · slope."""
    groups = build_groups(make_bert(), granularity, include=include)
    slopes = np.random.default_rng(0).uniform(0.1, 1, (groups.num_groups, num_points))
    return Statistics(groups, {"slope": slopes, "curvature": np.zeros_like(slopes)})


def plan_for(statistics, budget):
    return Plan(budget, REACH, 0, parse_select({"groups": statistics.groups.granularity}))


def best_of(values, counts, budget):
    """Return the best set by trying all of them."""
    sets = (set(s) for size in range(len(counts) + 1) for s in combinations(range(len(counts)), size))
    return max((s for s in sets if sum(counts[list(s)]) <= budget), key=lambda s: values[list(s)].sum() if s else 0.0)


def test_tensors_against_all_subsets():
    statistics = of_groups("tensor", 3, SIX)
    counts, slopes = statistics.groups.counts, statistics.columns["slope"]
    assert len(counts) == 6
    budget = int(counts.sum() * 0.6)
    found = across_horizons(statistics, METHOD, plan_for(statistics, budget))

    best = [best_of(slopes[:, q], counts, budget) for q in range(3)]
    assert len({frozenset(one) for one in best}) > 1, "the points disagree"
    densities = slopes / counts[:, None]
    ranks = rankdata(densities, axis=0)
    for p in range(3):
        for q in range(3):
            share = slopes[list(best[p]), q].sum() / slopes[list(best[q]), q].sum()
            assert found["captured"][p][q] == pytest.approx(share)
            shared = counts[list(best[p] & best[q])].sum() / counts[list(best[p])].sum()
            assert found["overlap"][p][q] == pytest.approx(shared)
            assert found["density_correlation"][p][q] == pytest.approx(np.corrcoef(ranks[:, p], ranks[:, q])[0, 1])
    assert all(0 < share < 1 for share in found["random"]["captured"])
    assert "uniform" not in found


@pytest.mark.parametrize("granularity", ["row", "role"])
def test_points_that_agree(granularity):
    statistics = of_groups(granularity, 1)
    twice = Statistics(statistics.groups, {name: np.repeat(c, 2, 1) for name, c in statistics.columns.items()})
    found = across_horizons(twice, METHOD, plan_for(twice, 2000))
    for name in ("captured", "overlap", "density_correlation"):
        np.testing.assert_allclose(found[name], np.ones((2, 2)), rtol=1e-9)
    for name in ("random", "uniform") if granularity == "row" else ("random",):
        assert found[name]["captured"][0] < 1


def test_elements_measured_along_a_probe():
    """The best of a point is the top of its values; measuring and choosing are the real ones."""
    settings = parse_select(
        {
            "groups": "element",
            "include": SIX,
            "probe_steps": 4,
            "probe_points": 3,
            "probe_learning_rate": 3e-2,
            "warmup_steps": 2,
        }
    )
    model = make_bert().eval()
    groups = build_groups(model, "element", include=SIX)
    passes = passes_for(model, WholeModel(model, [info.name for info in groups.parameters], groups.always_train))
    statistics = measure(METHOD, passes, groups, settings)
    budget = 40
    found = across_horizons(statistics, METHOD, Plan(budget, REACH, 0, settings))

    columns = {
        name: torch.cat([shard.columns[name] for shard in statistics.elements]).double().numpy()
        for name in ("slope", "curvature")
    }
    slope, curvature = columns["slope"], np.maximum(columns["curvature"], 1e-300)
    values = np.where(REACH * curvature < slope, REACH * slope - REACH**2 * curvature / 2, slope**2 / (2 * curvature))
    values = np.where(slope > 0, values, 0)
    top = [set(np.argsort(-values[:, q], kind="stable")[:budget].tolist()) for q in range(3)]
    assert top[0] != top[2], "training moves the choice"
    for p in range(3):
        for q in range(3):
            share = values[list(top[p]), q].sum() / values[list(top[q]), q].sum()
            assert found["captured"][p][q] == pytest.approx(share, rel=1e-4)
            assert found["overlap"][p][q] == pytest.approx(len(top[p] & top[q]) / budget)
    assert max(found["random"]["captured"]) < min(found["captured"][0])

"""Slope and curvature of single elements against plain float64 autograd and the exact Fisher diagonal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from adapeft.data.batches import Calibration
from adapeft.measure.exact.elementwise import mean_gradient, measure_elements
from adapeft.measure.groups import build_groups
from adapeft.measure.shards.shards import WholeModel
from tests.on_ranks.statistics import passes_for
from tests.oracles.measuring import class_scores, gradients, group_sums, mean_gradients, num_predictions, sampled
from tests.support.tiny import make_batches, make_bert, make_gpt2


def set_up(make, num_micro=1):
    model = make().eval()
    groups = build_groups(model, "element")
    passes = passes_for(model, WholeModel(model, [info.name for info in groups.parameters], num_micro=num_micro))
    torch.manual_seed(2)
    return model, passes, groups, [torch.randn(info.count) for info in groups.parameters]


def column(statistics, name):
    return torch.cat([shard.columns[name] for shard in statistics.elements]).double()


def fisher_draws(model, passes, groups):
    """Return T g̃² of every batch of half B, [M, elements]."""
    half_b = sampled(model, make_batches(model, num_batches=7), passes.seed)[3:]
    return torch.stack([num_predictions(batch) * torch.cat(gradients(model, batch, groups)) ** 2 for batch in half_b])


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_against_autograd(make):
    model, passes, groups, direction = set_up(make)
    actual = measure_elements(passes, groups, direction, shrinkage=False)
    along = torch.cat(direction).double()
    slope = torch.cat(mean_gradients(model, make_batches(model, num_batches=7)[3:], groups)) * along
    curvature = fisher_draws(model, passes, groups).mean(0) * along**2
    torch.testing.assert_close(column(actual, "slope"), slope, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(column(actual, "curvature"), curvature, rtol=1e-3, atol=1e-7)
    for name, values in {"slope": slope, "curvature": curvature}.items():
        expected = group_sums(groups, [values])
        np.testing.assert_allclose(actual.columns[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("num_micro", [1, 3])
def test_errors_of_slopes_against_the_gradients_of_single_batches(make, num_micro):
    model, passes, groups, direction = set_up(make, num_micro)
    actual = measure_elements(passes, groups, direction, shrinkage=False).columns["slope_error"]
    half_b = make_batches(model, num_batches=7)[3:]
    along = [piece.double() for piece in direction]
    each = np.stack(
        [
            group_sums(groups, [g * d for g, d in zip(gradients(model, batch, groups), along, strict=True)])
            for batch in half_b
        ]
    )
    weights = np.array([num_predictions(batch) for batch in half_b])
    assert len(set(weights)) > 1, "else weights are not tested"
    mean = weights @ each / weights.sum()
    error = np.sqrt(weights @ (each - mean) ** 2 / weights.sum() / (len(half_b) - 1))
    np.testing.assert_allclose(actual, error, rtol=1e-3, atol=1e-5)
    one = replace(passes, calibration=Calibration(passes.calibration.half_a, passes.calibration.half_b[:1]))
    assert np.isnan(measure_elements(one, groups, direction, shrinkage=False).columns["slope_error"]).all()


def test_shrinkage_is_of_the_fisher_diagonal_not_of_its_product_with_the_direction(bert):
    model, passes, groups, direction = set_up(make_bert)
    raw = measure_elements(passes, groups, direction, shrinkage=False)
    shrunk = measure_elements(passes, groups, direction, shrinkage=True)
    assert torch.equal(column(raw, "slope"), column(shrunk, "slope"))
    num_draws, start = len(passes.calibration.half_b), 0
    fisher = fisher_draws(model, passes, groups).mean(0)
    for info, shard, along in zip(groups.parameters, shrunk.elements, direction, strict=True):
        h = fisher[start : start + info.count]
        start += info.count
        variance = float(h.var(correction=0))
        s = min(1.0, 2 / (num_draws + 2) * float(h.square().mean()) / max(variance, 1e-300))
        expected = ((1 - s) * h + s * h.mean()) * along.double() ** 2
        torch.testing.assert_close(shard.columns["curvature"].double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_curvatures_converge_to_the_fisher_diagonal():
    model, passes, groups, _ = set_up(make_bert)
    ones = [torch.ones(info.count) for info in groups.parameters]
    exact = torch.stack(
        [
            sum(p * torch.cat(score) ** 2 for p, score in class_scores(model, batch, groups))
            for batch in make_batches(model, num_batches=7)[3:]
        ]
    ).mean(0)
    total = torch.zeros_like(exact)
    for seed in range(100):
        total += column(measure_elements(replace(passes, seed=seed), groups, ones, shrinkage=False), "curvature")
    measured = total / 100
    large = exact > exact.median()
    assert float((measured / exact - 1)[large].abs().mean()) < 0.1
    assert float(measured.sum() / exact.sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("num_micro", [2, 3])
def test_micro_batches_only_round_differently(make, num_micro):
    _, passes, groups, direction = set_up(make)
    _, split, _, _ = set_up(make, num_micro)
    whole = measure_elements(passes, groups, direction, shrinkage=True)
    parts = measure_elements(split, groups, direction, shrinkage=True)
    for name in ("slope", "curvature"):
        torch.testing.assert_close(column(parts, name), column(whole, name), rtol=1e-3, atol=1e-6)


def test_mean_gradient_weighs_predictions_alike(gpt2):
    model, passes, groups, _ = set_up(make_gpt2)
    actual = torch.cat(mean_gradient(passes, "gradient", passes.calibration.batches)).double()
    expected = torch.cat(mean_gradients(model, make_batches(model, num_batches=7), groups))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)

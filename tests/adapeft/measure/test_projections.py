"""Slopes and curvatures of groups against plain float64 autograd and the exact Fisher matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from adapeft.data.batches import Calibration
from adapeft.measure.groups import build_groups
from adapeft.measure.projections import measure_projections
from adapeft.measure.shards.shards import WholeModel
from tests.on_ranks.statistics import passes_for
from tests.oracles.measuring import class_scores, gradients, group_sums, num_predictions, sampled
from tests.support.tiny import make_batches, make_bert, make_gpt2

CASES = [(make, granularity) for make in (make_bert, make_gpt2) for granularity in ("tensor", "row")]


def set_up(make, granularity, num_micro=1):
    """Return the model, its passes and groups, and a random direction."""
    model = make().eval()
    groups = build_groups(model, granularity)
    passes = passes_for(model, WholeModel(model, [info.name for info in groups.parameters], num_micro=num_micro))
    torch.manual_seed(2)
    direction = [torch.randn(info.count) for info in groups.parameters]
    return model, passes, groups, direction


def project(groups, pieces, direction):
    return group_sums(groups, [piece * along.double() for piece, along in zip(pieces, direction, strict=True)])


@pytest.mark.parametrize(("make", "granularity"), CASES)
def test_slopes_and_their_errors(make, granularity):
    model, passes, groups, direction = set_up(make, granularity)
    actual = measure_projections(passes, groups, direction)
    half_b = make_batches(model, num_batches=7)[3:]
    weights = np.array([num_predictions(batch) for batch in half_b])
    assert len(set(weights)) > 1, "else weights are not tested"
    each = np.stack([project(groups, gradients(model, batch, groups), direction) for batch in half_b])
    mean = weights @ each / weights.sum()
    np.testing.assert_allclose(actual["slope"], mean, rtol=1e-4, atol=1e-5)
    error = np.sqrt(weights @ (each - mean) ** 2 / weights.sum() / (len(half_b) - 1))
    np.testing.assert_allclose(actual["slope_error"], error, rtol=1e-3, atol=1e-5)


def test_the_error_of_equal_batches_is_the_standard_error_of_the_mean(bert):
    _, passes, groups, direction = set_up(make_bert, "tensor")
    passes = replace(passes, calibration=Calibration(passes.calibration.half_a, passes.calibration.half_b[:3]))
    actual = measure_projections(passes, groups, direction)
    half_b = make_batches(bert, num_batches=7)[3:6]
    each = np.stack([project(groups, gradients(bert, batch, groups), direction) for batch in half_b])
    np.testing.assert_allclose(actual["slope_error"], each.std(0, ddof=1) / np.sqrt(3), rtol=1e-3, atol=1e-5)


def test_one_batch_has_no_error_to_tell():
    _, passes, groups, direction = set_up(make_bert, "tensor")
    passes = replace(passes, calibration=Calibration(passes.calibration.half_a, passes.calibration.half_b[:1]))
    assert np.isnan(measure_projections(passes, groups, direction)["slope_error"]).all()


@pytest.mark.parametrize(("make", "granularity"), CASES)
def test_curvatures_from_the_same_sampled_labels(make, granularity):
    model, passes, groups, direction = set_up(make, granularity)
    actual = measure_projections(passes, groups, direction)["curvature"]
    half_b = sampled(model, make_batches(model, num_batches=7), passes.seed)[3:]
    draws = [
        num_predictions(batch) * project(groups, gradients(model, batch, groups), direction) ** 2 for batch in half_b
    ]
    np.testing.assert_allclose(actual, np.mean(draws, axis=0), rtol=1e-3, atol=1e-6)
    assert (actual >= 0).all()


@pytest.mark.slow
def test_curvatures_converge_to_the_fisher_form():
    model, passes, groups, direction = set_up(make_bert, "row")
    half_b = make_batches(model, num_batches=7)[3:]
    exact = np.mean(
        [
            sum(p * project(groups, score, direction) ** 2 for p, score in class_scores(model, batch, groups))
            for batch in half_b
        ],
        axis=0,
    )
    draws = np.stack(
        [measure_projections(replace(passes, seed=seed), groups, direction)["curvature"] for seed in range(100)]
    )
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - exact) <= 5 * error + 1e-9).all()
    large = exact > np.median(exact)
    assert np.abs(draws.mean(0) / np.where(large, exact, 1) - 1)[large].mean() < 0.1


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("num_micro", [2, 3])
def test_micro_batches_only_round_differently(make, num_micro):
    _, passes, groups, direction = set_up(make, "row")
    _, split, _, _ = set_up(make, "row", num_micro)
    whole = measure_projections(passes, groups, direction)
    for name, column in measure_projections(split, groups, direction).items():
        np.testing.assert_allclose(column, whole[name], rtol=1e-3, atol=1e-6)


def test_a_batch_takes_one_forward_pass_for_both_labels():
    _, passes, groups, direction = set_up(make_bert, "tensor")
    calls = []
    passes.shards.model.register_forward_hook(lambda *args: calls.append(1))
    measure_projections(passes, groups, direction)
    assert len(calls) == len(passes.calibration.half_b)

"""Directions against plain float64 autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from adapeft.measure.direction import measure_direction
from adapeft.measure.groups import build_groups
from adapeft.measure.shards.shards import Slice, WholeModel
from adapeft.ranks import OneRank
from tests.on_ranks.statistics import passes_for
from tests.oracles.measuring import gradients, mean_gradients, num_predictions
from tests.support.tiny import make_batches, make_bert, make_gpt2

NOISE = 1e-5
# The models are float64, so only the sums over batches, which are float32, are rounded. A float32 gradient depends on
# the processor's order of sums; where its exact value is zero (a key's bias, to which softmax is invariant), it is
# nothing but rounding. Each of the two sums over 3 batches takes a cast, 3 products, 3 additions and a division, one of
# them also a root, and the direction is their quotient: at most 16 roundings of numbers no larger than the root mean
# square of the gradient over the batches, which is at most the length it is divided by.
ROUNDING = 16 * torch.finfo(torch.float32).eps


def measured(model, kind, num_micro=1):
    groups = build_groups(model.double().eval(), "tensor")
    passes = passes_for(model, WholeModel(model, [info.name for info in groups.parameters], num_micro=num_micro))
    half_a = make_batches(model, num_batches=7)[: len(passes.calibration.half_a)]
    return torch.cat(measure_direction(passes, kind)).double(), half_a, groups


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_adam(make):
    model = make()
    actual, half_a, groups = measured(model, "adam")
    weights = torch.tensor([num_predictions(batch) for batch in half_a], dtype=torch.float64)
    each = torch.stack([torch.cat(gradients(model, batch, groups)) for batch in half_a])
    mean = (weights[:, None] * each).sum(0) / weights.sum()
    square = (weights[:, None] * each**2).sum(0) / weights.sum()
    size = mean.square().mean().sqrt()
    length = square.sqrt() + NOISE * size
    torch.testing.assert_close(actual, mean / length, rtol=0, atol=ROUNDING)
    assert float(actual.abs().max()) <= 1 + ROUNDING, "a coordinate moves by at most one a unit of reach"


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_gradient_has_unit_root_mean_square_over_the_model(make):
    model = make()
    actual, half_a, groups = measured(model, "gradient")
    mean = torch.cat(mean_gradients(model, half_a, groups))
    size = mean.square().mean().sqrt()
    largest = max(float(torch.cat(gradients(model, batch, groups)).abs().max()) for batch in half_a)
    torch.testing.assert_close(actual, mean / size, rtol=0, atol=ROUNDING * largest / float(size))


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("num_micro", [2, 3])
def test_micro_batches_only_round_differently(make, num_micro):
    whole, _, _ = measured(make(), "adam")
    split, _, _ = measured(make(), "adam", num_micro)
    torch.testing.assert_close(split, whole, rtol=0, atol=2 * ROUNDING)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_gradient_of_rounding_noise_gives_no_direction_whatever_the_scale_of_the_loss(scale):
    gradients = [torch.tensor([1.0, 2.0, -1e-9]) * scale, torch.tensor([3.0, 2.0, -1e-9]) * scale]
    shards = SimpleNamespace(slices=(Slice(0, 0, 3),), ranks=OneRank(), device=torch.device("cpu"))

    def fold(name, batches, sums, take, *, is_linear):
        for batch in batches:
            take(0, gradients[batch], 1)
            yield 1

    passes = SimpleNamespace(shards=shards, calibration=SimpleNamespace(half_a=(0, 1)), fold=fold)
    expected = torch.tensor([2 / 5**0.5, 1.0, 0.0])
    torch.testing.assert_close(measure_direction(passes, "adam")[0], expected, rtol=0, atol=1e-4)  # 1e-9 / NOISE


def test_no_gradient_gives_no_direction(bert):
    with torch.no_grad():
        bert.classifier.weight.zero_()
    for kind in ("adam", "gradient"):
        direction, _, _ = measured(bert, kind)
        assert torch.equal(direction, torch.zeros_like(direction))

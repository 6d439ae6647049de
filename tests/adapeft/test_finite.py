"""Measuring and choosing stop at a number that is not finite and name its origin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import adapeft
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.finite import blame, check_finite, is_finite, listed
from adapeft.measure.groups import groups_of
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.ranks import OneRank
from adapeft.selection.choose import choose
from tests.support.thread_ranks import on_ranks
from tests.support.tiny import make_bert

SIZE, BAD = 3, 5
"""Examples per batch, and the index of the bad example, which is in the first half of six batches."""


def image_model() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    model.config.architectures = ["ViTModel"]
    return model


def images(bad: int | None) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(6):
        pixels = torch.randn(SIZE, 3, 8, 8, generator=generator)
        if bad is not None and bad // SIZE == index:
            pixels[bad % SIZE, 0, 0, 0] = math.nan
        batches.append({"pixel_values": pixels, "labels": torch.randint(0, 3, (SIZE,), generator=generator)})
    return batches


def regression_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = BertConfig(vocab_size=29, max_position_embeddings=16, num_labels=1, **sizes)
    model = BertForSequenceClassification(config)  # its head counts as trained, so no warm-up changes the gradients
    with torch.no_grad():
        model.classifier.weight.mul_(1000)  # so that gradients are much larger than residuals
    return model


def targets(scale: float) -> list[dict]:
    """Return batches whose targets are about 1, except that of example ``BAD``, which is ``scale``."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(6):
        ids = torch.randint(1, 29, (SIZE, 6), generator=generator)
        labels = torch.randn(SIZE, generator=generator)
        if index == BAD // SIZE:
            labels[BAD % SIZE] = scale
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


OPTIONS = [
    {"groups": "row"},
    {"groups": "row", "joint": True},
    {"groups": "row", "solver": "greedy"},
    {"groups": "row", "options": ["row", "lora"]},
    {"groups": "row", "probe_steps": 3, "probe_points": 2},
    {"groups": "element"},
    {"groups": "element", "joint": False},
    {"groups": "tensor", "warmup_steps": 0, "curvature": "parabola"},
    {"method": "sam"},
    {"method": "sam", "groups": "row"},
    {"method": "fish"},
    {"method": "child-tuning-d"},
]


@pytest.mark.parametrize("bad", [BAD, 13])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_whose_loss_is_nan_is_named(options, bad):
    model = image_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapeftError, match=rf"the loss of a calibration batch is nan\. .*example {bad} of the batches"):
        adapeft.select(model, images(bad), budget="10%", **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"groups": "row"}, {"groups": "element", "joint": False}, {"method": "sam"}])
def test_a_target_whose_square_is_infinite_is_named(options):
    with pytest.raises(AdapeftError, match=rf"batch is inf\. It comes from example {BAD} of the batches"):
        adapeft.select(regression_model(), targets(1e25), budget="10%", **options)


@pytest.mark.parametrize("options", [{"groups": "row"}, {"groups": "element"}, {"method": "fish"}])
def test_a_finite_loss_whose_squared_gradient_is_infinite_is_named(options):
    """A loss of about 1e37 fits into float32; the square of its gradient, above 1e39, does not."""
    said = rf"is .*e\+3., but its gradient or squared gradient is too large .* of example {BAD}\."
    with pytest.raises(AdapeftError, match=said):
        adapeft.select(regression_model(), targets(1e19), budget="10%", **options)


def test_a_squared_mean_that_overflows_is_no_statistic():
    """The loss, the gradient and their sums are finite; only the final statistic of SAM is not."""
    with pytest.raises(AdapeftError, match=r"select\.method = sam: 'squared_gradient' of '.*' is not finite"):
        adapeft.select(regression_model(), targets(1e19), budget="10%", method="sam")


def test_weights_that_are_not_finite_are_no_statistic():
    model = make_bert()
    with torch.no_grad():
        model.get_parameter("bert.pooler.dense.weight")[0, 0] = math.inf
    with pytest.raises(AdapeftError, match=r"'magnitude' of 'bert\.pooler\.dense\.weight' is not finite"):
        adapeft.select(model, images(None), budget="10%", method="magnitude")


def test_every_rank_says_the_same_of_a_shard_that_one_holds():
    groups = groups_of(make_bert(), parse_select({"groups": "element"}))

    def check(ranks):
        value = math.nan if ranks.rank == 1 else 1.0
        shard = ElementShard(Slice(2, ranks.rank * 3, 3), {"slope": torch.full((3,), value)})
        with pytest.raises(AdapeftError) as error:
            Statistics(groups, {}, (shard,)).check_finite("measuring", "Measure again.", ranks)
        return str(error.value)

    said = f"measuring: 'slope' of '{groups.parameters[2].name}' is not finite. Measure again."
    assert on_ranks(2, check) == [said, said]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("joint", [False, True])
def test_values_that_are_not_finite_are_not_chosen_from(value, joint):
    """A very large reach makes values of finite statistics infinite."""
    groups = groups_of(make_bert(), parse_select({"groups": "row"}))
    slopes = np.ones(groups.num_groups)
    slopes[7] = value if math.isnan(value) else 1e300
    columns = {
        "slope": slopes,
        "curvature": np.zeros(groups.num_groups),
        "projections": np.zeros((groups.num_groups, 2)),
    }
    settings = parse_select({"groups": "row", "joint": joint})
    if math.isnan(value):  # the formula gives a NaN slope the influence 0, so it is rejected earlier
        with pytest.raises(AdapeftError, match=r"'slope' of .* is not finite"):
            Statistics(groups, columns).check_finite("measuring", "", OneRank())
        return
    with pytest.raises(AdapeftError, match=r"the value of 'bert\..*' is inf \(1 such values\)"):
        choose(settings, Statistics(groups, columns), reach=1e20, seed=0, ranks=OneRank())


@pytest.mark.parametrize("joint", [False, True])
def test_element_values_that_overflow_are_not_chosen_from(joint):
    groups = groups_of(make_bert(), parse_select({"groups": "element"}))
    elements = tuple(
        ElementShard(
            Slice(index, 0, info.count),
            {"slope": torch.full((info.count,), 1e30), "curvature": torch.full((info.count,), 1e-30)},
        )
        for index, info in enumerate(groups.parameters)
    )
    settings = parse_select({"groups": "element", "joint": joint})
    with pytest.raises(AdapeftError, match=r"not finite|(value|bound) of the choice is (inf|nan)"):
        choose(settings, Statistics(groups, {}, elements), reach=1e300, seed=0, ranks=OneRank())


def test_is_finite():
    assert is_finite(torch.full((4,), 3e38))  # the sum overflows
    assert is_finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert is_finite(torch.tensor([2**62, 2**62]))
    assert not is_finite(torch.tensor([1.0, math.nan]))
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
    assert is_finite(torch.empty(0))


def test_what_is_not_finite_is_counted_and_named():
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, math.inf, math.nan])}
    with pytest.raises(AdapeftError, match=r"out: 'bad' holds 2 of 3 values that are not finite \(such as inf\)\. Do"):
        check_finite(tensors, "out", "Do it again.")


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({3: 1.0, 8: math.nan}, r"It comes from example 8 of data\.train \(counted from 0\)\."),
        ({3: math.inf, 8: math.nan, 9: 0.1}, "It comes from examples 3, 8 of"),
        ({3: math.inf, 8: math.nan}, r"Each of its examples .* \(3, 8 of data\.train, .* more likely the weights"),
        ({3: math.nan}, "It comes from example 3 of"),
        ({3: 1.0, 8: 1e37}, r"Its examples are 3, 8 of .* the largest is 1e\+37, of example 8\."),
    ],
)
def test_blame(losses, said):
    with pytest.raises(AdapeftError, match=said):
        raise AdapeftError(blame(losses, "data.train"))


def test_long_lists_are_cut():
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"

"""Calibration batches without predictions have no weight in the statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from adapeft.config.load import parse_select
from adapeft.data.batches import Calibration
from adapeft.errors import AdapeftError
from adapeft.measure.groups import groups_of
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.measure import measure, ready
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from adapeft.ranks import OneRank
from adapeft.tasks.losses.micro_batches import micro_losses
from adapeft.tasks.losses.objective import IGNORED
from tests.on_ranks.statistics import passes_for
from tests.support.tiny import make_bert, make_gpt2

EMPTY = np.array([1000, 1001])


def hiding(collate):
    """Return a ``collate`` whose examples from index 1000 on have no predictions."""

    def collated(indices):
        batch = collate(indices % 1000)
        hidden = torch.tensor(indices >= 1000).view(-1, *[1] * (batch.labels.ndim - 1))
        return replace(batch, labels=batch.labels.masked_fill(hidden, IGNORED))

    return collated


def measured(make, settings, with_empty: bool, num_micro: int):
    model = make().eval()
    groups, method = groups_of(model, settings), get_method(settings.method)
    with seen(model, groups, method.window_rank(groups, settings), seed=3) as view:
        passes = passes_for(model, view.shards(WholeModel(model, view.names, groups.always_train, num_micro)))
        half_a, half_b = passes.calibration.half_a, passes.calibration.half_b
        if with_empty:
            half_a, half_b = (EMPTY, *half_a), (*half_b[:2], EMPTY, *half_b[2:], EMPTY)
        passes = replace(passes, collate=hiding(passes.collate), calibration=Calibration(half_a, half_b))
        return measure(method, passes, groups, settings)


@pytest.mark.parametrize(
    ("make", "num_micro"),
    [
        (make_bert, 2),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((make_bert, 1), (make_gpt2, 1), (make_gpt2, 2))],
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"groups": "row"},
        {"groups": "element"},
        {"groups": "role", "curvature": "parabola", "include": ["*.att*"]},
        {"groups": "tensor", "probe_steps": 3, "probe_points": 2},
        {"groups": "row", "measure": "low-rank", "rank": 3},
        {"groups": "element", "measure": "low-rank", "rank": 3},
        {"groups": "element", "method": "sam"},
        {"groups": "element", "method": "fish"},
        {"groups": "element", "method": "child-tuning-d"},
    ],
)
def test_global_batches_that_predict_nothing_have_no_weight(make, options, num_micro):
    settings = parse_select({"budget": "10%", "warmup_steps": 4, **options})
    plain, other = (measured(make, settings, with_empty, num_micro) for with_empty in (False, True))
    assert plain.columns.keys() == other.columns.keys()
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(other.columns[name], column)
    for shard, expected in zip(other.elements, plain.elements, strict=True):
        assert shard.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(shard.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_half_that_predicts_nothing(half):
    model = make_gpt2()
    settings = parse_select({"groups": "row"})
    groups = groups_of(model, settings)
    plain = passes_for(model, WholeModel(model, [info.name for info in groups.parameters]))
    name = f"half_{half.lower()}"
    passes = replace(
        plain, collate=hiding(plain.collate), calibration=replace(plain.calibration, **{name: (EMPTY, EMPTY)})
    )
    with pytest.raises(
        AdapeftError, match=f"half {half} of the calibration contains no prediction: .* its 2 batches is -1"
    ):
        ready(get_method("adapeft"), passes, groups, settings)
    assert ready(get_method("random"), passes, groups, settings).calibration is passes.calibration


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_the_loss_of_no_prediction_is_zero(make):
    model = make().eval()
    passes = passes_for(model, WholeModel(model, []))
    losses, num_predictions = micro_losses(
        EMPTY, hiding(passes.collate), passes.objective, OneRank(), 2, torch.device("cpu")
    )
    assert num_predictions == 0
    assert [loss(model).item() for loss in losses] == [0.0, 0.0]


def test_a_batch_shared_by_micro_batches_is_one_mean():
    """This also holds where a micro-batch has no predictions."""
    model = make_gpt2().eval()
    passes = passes_for(model, WholeModel(model, []))
    collate = hiding(passes.collate)
    batch = np.array([0, 1000, 1001, 2])
    means = []
    for num_micro in (1, 2, 4):
        losses, num_predictions = micro_losses(
            batch, collate, passes.objective, OneRank(), num_micro, torch.device("cpu")
        )
        means.append(sum(loss(model).item() for loss in losses))
        examples = collate(batch)
        assert num_predictions == int((examples.labels[:, 1:] != IGNORED).sum())
    with torch.no_grad():
        expected = float(model(**examples.inputs, labels=examples.labels).loss)
    assert means == pytest.approx([expected] * 3, rel=1e-5)

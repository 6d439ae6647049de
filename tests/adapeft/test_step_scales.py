"""Learning rates by tensor: curvatures of trained parts, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapeft.choose.subset import Part
from adapeft.config import Config
from adapeft.measure.direction import measure_direction
from adapeft.measure.groups import build_groups
from adapeft.measure.part_curvature import _mask, measure_part_curvatures
from adapeft.measure.projections import measure_curvatures
from adapeft.measure.shards import Slice, WholeModel
from adapeft.tune.step_scales import step_scales
from tests.cluster.rank_statistics import passes_for
from tests.tiny import make_bert, make_gpt2


def passes_of(model, groups):
    return passes_for(model, WholeModel(model, [info.name for info in groups.parameters]))


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_curvature_of_a_part_is_that_of_its_rows_together(make):
    """Cross terms between rows included, by another way: the projections that groups of rows leave."""
    model = make().eval()
    tensors, rows = build_groups(model, "tensor"), build_groups(model, "row")
    direction = measure_direction(passes_of(model, rows), "adam")
    projections = measure_curvatures(passes_of(model, rows), rows, direction)["projections"].astype(np.float64)
    parts, expected = {}, {}
    for index, info in enumerate(tensors.parameters):
        first, end = rows.firsts[index], [*rows.firsts[1:], rows.num_groups][index]
        mine = np.arange(end - first)[:: 2 if end - first > 1 else 1]
        is_matrix = len(info.shape) > 1 and end - first > 1
        part = Part("rows", info.shape, torch.from_numpy(mine), info.output_dim or 0)
        parts[info.name] = part if is_matrix else Part("tensor", info.shape)
        chosen = projections[first:end][mine if is_matrix else slice(None)]
        expected[info.name] = (chosen.sum(axis=0) ** 2).sum()
    actual = measure_part_curvatures(passes_of(model, tensors), tensors, parts)
    assert actual.keys() == expected.keys()
    assert any(part.kind == "rows" for part in parts.values())
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize(
    "part",
    [
        Part("tensor", (4, 6)),
        Part("rows", (4, 6), torch.tensor([1, 3]), 0),
        Part("rows", (4, 6), torch.tensor([0, 5]), 1),
        Part("elements", (4, 6), torch.tensor([0, 7, 8, 23])),
    ],
)
@pytest.mark.parametrize("cut", [0, 5, 12, 24])
def test_the_mask_of_a_slice_is_a_slice_of_the_mask(part, cut):
    whole = torch.zeros(4, 6, dtype=torch.bool)
    if part.kind == "tensor":
        whole[:] = True
    elif part.kind == "rows":
        whole.index_fill_(part.dim, part.indices, True)
    else:
        whole.view(-1)[part.indices] = True
    pieces = [_mask(part, Slice(0, 0, cut)), _mask(part, Slice(0, cut, 24 - cut))]
    assert torch.equal(torch.cat(pieces), whole.flatten())


def scaled(counts=None, **curvatures):
    return step_scales(curvatures, counts or dict.fromkeys(curvatures, 1))


def test_steps_are_brought_down_to_the_medians_and_never_raised():
    assert scaled(a=1.0, b=100.0, c=4.0, d=0.0, e=9.0) == {"a": 1.0, "b": 0.125, "c": 1.0, "d": 1.0, "e": 0.5}


def test_the_median_is_over_elements():
    """One large tensor is what most of the training happens in, however many small ones there are."""
    counts = {"a": 10, "b": 100, "c": 10, "d": 20}
    assert scaled(counts, a=1.0, b=16.0, c=0.0, d=256.0) == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.25}


def test_steps_have_a_smallest_and_can_all_be_equal():
    assert scaled(a=1.0, b=1.0, c=1e30) == {"a": 1.0, "b": 1.0, "c": 2.0**-12}
    assert scaled(a=0.0, b=0.0) == {"a": 1.0, "b": 1.0}
    assert scaled() == {}


@pytest.mark.parametrize("method", ["lora", "adapter", "mixout", "diff-pruning"])
def test_methods_without_steps_of_their_own_are_refused(method):
    content = {
        "model": {"name": "m", "task": "causal-lm"},
        "data": {"train": "t.jsonl", "evaluation": "e.jsonl"},
        "output": "o",
        "select": {"method": method},
        "train": {"limit_steps": True},
    }
    with pytest.raises(ValueError, match=f"train.limit_steps = true: {method} trains no fixed part"):
        Config.model_validate(content)

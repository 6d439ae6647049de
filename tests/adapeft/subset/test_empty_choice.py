"""Tests of an empty choice: refused by name, or drawn at random on request; training a head alone is valid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import adapeft
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.memory.limit import MemoryLimit
from adapeft.methods.registry import Plan, get_method
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank
from adapeft.selection.choose import choose
from adapeft.subset.empty import announcement, check_not_empty
from adapeft.subset.subset import Subset
from adapeft.validate.horizons import across_horizons
from tests.support.tiny import make_bert, make_gpt2

PARAMETERS = (
    ParameterInfo("linear", (4, 7), "linear", 0, 0.0, 0),
    ParameterInfo("bias", (4,), "bias", 0, 0.0, None),
)

SIGNS = {"slope": -1.0, "curvature": 1.0}


def uphill(granularity, always_train=()):
    """Return statistics in which every slope is negative: the loss of the other half rises along the direction."""
    groups = Groups(PARAMETERS, granularity, num_total=40, always_train=always_train, new=always_train)
    columns = {"slope": np.full(groups.num_groups, -1.0), "curvature": np.full(groups.num_groups, 2.0)}
    shards = tuple(
        ElementShard(
            Slice(index, 0, info.count), {"slope": -torch.ones(info.count), "curvature": torch.ones(info.count)}
        )
        for index, info in enumerate(PARAMETERS)
    )
    return Statistics(groups, columns, shards if granularity == "element" else ())


def _trained_head_of_two():
    said = make_bert().config.to_dict()
    config = BertConfig.from_dict({key: said[key] for key in said if key not in ("id2label", "label2id")})
    config.architectures = ["BertForSequenceClassification"]
    return config


def chosen(granularity, always_train=(), limit=None, **options):
    budget = {} if limit else {"budget": 12}
    settings = parse_select({"groups": granularity, **budget, **options})
    return choose(settings, uphill(granularity, always_train), reach=1.0, seed=3, ranks=OneRank(), limit=limit)


@pytest.mark.parametrize(
    ("granularity", "joint"),
    [("row", False), ("tensor", False), ("role", False), ("element", False), ("element", True)],
)
def test_nothing_is_refused(granularity, joint):
    subset = chosen(granularity, joint=joint)
    assert subset.count == 0
    with pytest.raises(AdapeftError, match=r"nothing to train: adapeft chose nothing, because none of the \d+ candid"):
        check_not_empty(subset)
    with pytest.raises(AdapeftError, match="nothing to train"):
        adapeft.attach(make_gpt2(), subset)


@pytest.mark.parametrize("granularity", ["row", "tensor", "element"])
def test_a_random_draw_in_its_place(tmp_path, granularity):
    subset = chosen(granularity, if_empty="random")
    groups = uphill(granularity).groups
    drawn = get_method("random").choose(
        groups, Statistics(groups, {}), Plan(12, 1.0, 3, parse_select({"method": "random"})), OneRank()
    )
    assert 0 < subset.count <= 12
    assert {name: (part.kind, part.count) for name, part in subset.parts.items()} == {
        name: (part.kind, part.count) for name, part in drawn.parts.items()
    }
    assert subset.parts == drawn.parts
    said = subset.choice.recorded()
    assert (said["method"], said["status"], said["value"], said["budget"]) == ("adapeft", "drawn", None, 12)
    assert "a random draw of the same budget is trained" in announcement(subset)
    subset.save(tmp_path / "subset.safetensors")
    assert announcement(Subset.load(tmp_path / "subset.safetensors")) == announcement(subset)
    check_not_empty(subset)


def test_a_draw_under_a_limit_in_bytes():
    limit = MemoryLimit(limit=1000, room=200, whole=16.0, leaf=20.0)
    subset = chosen("row", limit=limit, if_empty="random")
    assert 0 < subset.choice.memory_bytes <= 200


def test_a_head_alone_is_announced():
    subset = chosen("row", always_train=("score.weight",))
    check_not_empty(subset)
    assert "only the parameters of select.always_train are trained (score.weight)" in announcement(subset)
    assert (
        announcement(chosen("row", if_empty="random", always_train=("score.weight",)).described(advice="x")) is not None
    )


def test_a_choice_of_something_is_as_it_was():
    statistics = Statistics(uphill("row").groups, {"slope": np.ones(5), "curvature": np.ones(5)})
    settings = [parse_select({"budget": 12, "groups": "row", "if_empty": what}) for what in ("error", "random")]
    a, b = (choose(each, statistics, reach=1.0, seed=3, ranks=OneRank()) for each in settings)
    assert a.count == b.count > 0
    assert announcement(a) is announcement(b) is None
    assert a.choice.value == b.choice.value


def test_the_library_refuses_and_draws():
    """One text with both of two labels: the gradients of the two halves are opposite.

    The biases of keys are an exception: their exact gradient is zero, and the measured one is rounding.
    """
    torch.manual_seed(0)
    model = BertForSequenceClassification(_trained_head_of_two())
    ids = torch.tensor([[2, 5, 7, 3]])
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([y])} for y in (0, 1)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for groups in ("row", "element"):
        with pytest.raises(AdapeftError, match="nothing to train"):
            adapeft.select(model, batches, budget=100, groups=groups, exclude=["*key.bias"])
        drawn = adapeft.select(model, batches, budget=100, groups=groups, if_empty="random")
        assert 0 < drawn.count <= 100
        adapeft.detach(adapeft.attach(model, drawn))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_points_without_a_choice_are_shares_of_nothing():
    """Nothing is worth choosing at the second of two points; without any such point there is no comparison."""
    groups = uphill("row").groups
    plan = Plan(12, 1.0, 0, parse_select({"groups": "row"}))
    slopes = np.stack([np.ones(5), -np.ones(5)], axis=1)
    method = get_method("adapeft")
    found = across_horizons(Statistics(groups, {"slope": slopes, "curvature": slopes * 0}), method, plan)
    assert found["captured"][0] == [pytest.approx(1.0), None]
    assert found["random"]["captured"][1] is None
    with pytest.raises(AdapeftError, match="no choice to compare with others: adapeft chose nothing"):
        across_horizons(Statistics(groups, {"slope": -abs(slopes), "curvature": slopes * 0}), method, plan)


@pytest.mark.parametrize("method", ["random", "lora", "full", "adapter"])
def test_a_method_that_is_never_empty_takes_no_draw(method):
    with pytest.raises(
        AdapeftError, match=rf"if_empty = random: is an option of the methods .*, and select.method is {method}"
    ):
        parse_select({"method": method, "if_empty": "random"})

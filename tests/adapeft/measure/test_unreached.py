"""Parameters that no gradient reaches are neither chosen nor shipped, and are named."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapeft import attach, delta, select
from adapeft.config.load import parse_select
from adapeft.data.batches import Calibration
from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.measure.groups import groups_of
from adapeft.measure.measure import measure
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import WholeModel
from adapeft.measure.storage import load_statistics, save_groups
from adapeft.methods.registry import METHODS, get_method
from adapeft.parts.adapter import Adapter
from adapeft.parts.lora import Lora
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tasks.losses.cross_entropy import Classification
from adapeft.tune.attachment import attachment_of
from tests.support.tiny import make_batches, make_bert, make_gpt2

UNUSED = "bert.encoder.layer.0.unused.weight"


def with_unused(make=make_bert) -> nn.Module:
    """Return a model with a layer in the middle that nothing calls."""
    model = make()
    block = model.bert.encoder.layer[0] if make is make_bert else model.transformer.h[0]
    block.unused = nn.Linear(12, 12, bias=False)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_no_method_chooses_what_the_calibration_does_not_reach(method):
    model = with_unused()
    options = {"method": method, "budget": "20%"} | ({"fill": False} if method == "adapeft" else {})
    with pytest.warns(UserWarning, match=f"no calibration batch gives them a gradient: {UNUSED}"):
        subset = select(model, make_batches(model), **options)
    assert subset.parts
    assert not any(name.startswith("bert.encoder.layer.0.unused") for name in subset.parts)
    assert subset.choice.unreached == [UNUSED]


def passes_of(model: nn.Module, groups) -> Passes:
    batches = []
    for batch in make_batches(model):
        labels = batch.pop("labels")
        batches.append(Batch(batch, labels, torch.arange(len(labels))))
    order = tuple(np.array([index]) for index in range(len(batches)))
    shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train)
    return Passes(shards, Classification(), Calibration(order[:3], order[3:]), lambda ids: batches[int(ids[0])], 0)


CASES = [
    {"groups": "row"},
    {"groups": "tensor"},
    {"groups": "element"},
    {"groups": "role"},
    {"groups": "row", "joint": True},
    {"groups": "row", "options": ["row", "tensor", "lora"], "lora_ranks": [1, 2]},
    {"groups": "row", "probe_steps": 3, "probe_points": 2},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(settings) + "-" + settings["groups"])
def test_statistics_are_those_of_a_measurement_without_it(settings):
    method, found = get_method("adapeft"), []
    for exclude in ([], [UNUSED]):
        model = with_unused().eval()
        asked = parse_select({"budget": "10%", "warmup_steps": 2, "exclude": exclude, **settings})
        groups = groups_of(model, asked)
        found.append(measure(method, passes_of(model, groups), groups, asked))
    ours, expected = found
    assert ours.groups.parameters == expected.groups.parameters
    assert ours.groups.unreached == (UNUSED,)
    assert ours.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        # Adam's direction derives its level of rounding noise from the gradient of all candidates.
        np.testing.assert_allclose(ours.columns[name], column, rtol=1e-2, atol=1e-6)
    assert [shard.slice for shard in ours.elements] == [shard.slice for shard in expected.elements]
    if expected.options is not None:
        assert np.array_equal(ours.options.parameters, expected.options.parameters)
        assert np.array_equal(ours.options.ranks, expected.options.ranks)


def test_saved_statistics_remember_what_was_left_out(tmp_path):
    model = with_unused().eval()
    asked = parse_select({"budget": "10%", "groups": "row"})
    groups = groups_of(model, asked)
    statistics = measure(get_method("random"), passes_of(model, groups), groups, asked)
    save_groups(tmp_path, statistics.groups, statistics.columns, {})
    assert load_statistics(tmp_path)[0].groups == statistics.groups


@pytest.mark.parametrize("method", ["random", "magnitude", "lora", "bitfit", "full"])
def test_a_method_that_measures_nothing_takes_no_backward_pass(method, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.warns(UserWarning, match=UNUSED):
        assert select(with_unused(), make_batches(make_bert()), method=method, budget="20%").parts


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_a_checkpoint_hides_is_reached(use_reentrant):
    """The graph of a reentrant checkpoint shows none of the parameters within it."""
    model = with_unused(make_gpt2)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with pytest.warns(UserWarning, match=r"left out, .*: transformer\.h\.0\.unused\.weight\.$"):
        subset = select(model, make_batches(model), method="full", groups="tensor")
    assert len(subset.parts) == len(list(make_gpt2().parameters()))


class Experts(nn.Module):
    """Mixture that routes by the sign of the first feature; each expert is a separate module."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x[0, 0] > 0)](x)


def parts_of(model: nn.Module) -> Subset:
    return Subset({name: Whole(tuple(value.shape)) for name, value in model.named_parameters()})


def step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).sum().backward()
    optimizer.step()


def test_an_expert_that_a_later_batch_reaches_is_trained():
    model = attach(Experts(), parts_of(Experts()))
    step(model, torch.ones(2, 3))
    with pytest.raises(AdapeftError, match=r"2 of the 4 .* no gradient .*: experts\.0\.weight, experts\.0\.bias\."):
        delta(model)
    step(model, -torch.ones(2, 3))
    assert len(delta(model).changes) == 4


def test_a_value_from_elsewhere_needs_no_gradient():
    model = attach(Experts(), parts_of(Experts()))
    assert attachment_of(model).unreached == list(attachment_of(model).owners)
    step(model, torch.ones(2, 3))
    with torch.no_grad():
        for parameter in model.experts[0].parameters():
            parameter.add_(1.0)
    assert len(delta(model).changes) == 4


class CalledByNobody(nn.Module):
    """Reads the weight of a layer without calling it, as mixers do, so LoRA and adapters there have no effect."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


@pytest.mark.parametrize(
    ("name", "part"),
    [("read.weight", Lora((4, 4), 0, 2, 2)), ("read", Adapter((4,), 2))],
)
def test_lora_and_adapters_on_a_layer_that_nothing_calls_are_named(name, part):
    model = CalledByNobody()
    attach(model, Subset({name: part, "called.bias": Whole((4,))}))
    step(model, torch.ones(2, 4))
    with pytest.raises(
        AdapeftError, match=rf"no gradient .*: {name}\. .*LoRA and adapters also have no effect on a layer"
    ):
        delta(model)


def test_nothing_is_known_of_a_model_that_was_not_trained_here():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delta(attach(make_gpt2(), parts_of(make_gpt2())))

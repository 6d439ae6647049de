"""Tests of adapters: placement, computation, the bottleneck for a budget, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adapeft
from adapeft import AdapeftError, Delta, attach, delta, detach, merge
from adapeft.config.load import parse_select
from adapeft.model.structure import describe_parameters
from adapeft.parts.adapter import Adapter
from adapeft.parts.lora import Lora
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import logits, train
from tests.oracles.parts import MODELS
from tests.support.tiny import make_batches, make_bert, make_gpt2

FEED_FORWARD = {
    "bert": "bert.encoder.layer.{}.output.dense",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama": "model.layers.{}.mlp.down_proj",
}
ATTENTION = {
    "bert": "bert.encoder.layer.{}.attention.output.dense",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
}
PLACE = FEED_FORWARD["bert"].format(0)


def choose(model: nn.Module, budget: int, **options: object) -> Subset:
    return adapeft.select(model, make_batches(model), method="adapter", budget=budget, seed=3, **options)


@pytest.mark.parametrize("name", MODELS)
def test_output_projections_are_found(name):
    found = {info.name: info.output_of for info in describe_parameters(MODELS[name]()) if info.output_of}
    expected = {f"{FEED_FORWARD[name].format(layer)}.weight": "feed-forward" for layer in (0, 1)}
    assert found == expected | {f"{ATTENTION[name].format(layer)}.weight": "attention" for layer in (0, 1)}


def test_a_mixture_has_no_one_output():
    block = nn.Module()
    block.attn_out = nn.Linear(4, 4)
    block.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(2))
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    found = {info.name: info.output_of for info in describe_parameters(model) if info.output_of}
    assert found == {"blocks.0.attn_out.weight": "attention"}


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("name", MODELS)
def test_the_method_takes_the_largest_bottleneck(name, placement):
    model = MODELS[name]()
    places = {FEED_FORWARD[name].format(layer) for layer in (0, 1)}
    if placement == "houlsby":
        places |= {ATTENTION[name].format(layer) for layer in (0, 1)}

    def size(bottleneck: int) -> int:
        return len(places) * (bottleneck * 25 + 12)

    for budget, bottleneck in ((size(1), 1), (size(4) - 1, 3), (size(4), 4)):
        subset = choose(model, budget, placement=placement)
        assert {key: (p.kind, p.shape, p.rank) for key, p in subset.parts.items()} == dict.fromkeys(
            places, ("adapter", (12,), bottleneck)
        )
        assert subset.count == size(bottleneck)
    with pytest.raises(AdapeftError, match=f"{len(places)} adapters with a bottleneck of 1 have {size(1)}. Raise"):
        choose(model, size(1) - 1, placement=placement)
    with pytest.raises(
        AdapeftError, match=r"no candidate is the output projection of feed-forward.*mixtures of experts have none"
    ):
        choose(model, 100, placement=placement, include="*embed*" if name != "gpt2" else "*wte*")


class Reference(nn.Module):
    """A layer followed by a bottleneck of the given weights."""

    def __init__(self, layer: nn.Module, pieces: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.pieces = layer, pieces

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        down, up = self.pieces["down.weight"], self.pieces["up.weight"]
        inner = output @ down.T + self.pieces["down.bias"]
        gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        return output + gelu @ up.T + self.pieces["up.bias"]


@pytest.mark.parametrize("name", MODELS)
def test_trained_adapters_compute_their_formula_and_come_back_from_disk(name, tmp_path):
    model = MODELS[name]()
    before = logits(model)
    subset = choose(model, 4 * (25 * 3 + 12), placement="houlsby")
    attach(model, subset)
    assert torch.equal(logits(model), before)
    train(model)
    assert not torch.allclose(logits(model), before)
    delta(model).save(tmp_path / "delta.safetensors")
    found = Delta.load(tmp_path / "delta.safetensors")
    assert found.count == subset.count
    new = sum(value.numel() for value in found.new.values())
    assert (tmp_path / "delta.safetensors").stat().st_size <= 4 * (subset.count + new) + 5000

    base, reference = MODELS[name](), MODELS[name]()
    applied = found.apply(base)
    assert torch.equal(logits(base), logits(model))
    assert not any("adapter" in key for key, parameter in base.named_parameters() if parameter.requires_grad)
    for place, change in found.changes.items():
        parent, _, child = place.rpartition(".")
        layer = reference.get_submodule(place)
        setattr(reference.get_submodule(parent), child, Reference(layer, change.part.split(change.values)))
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for key, value in found.new.items():
            parameters[key].copy_(value)
    torch.testing.assert_close(logits(reference), logits(model), rtol=1e-4, atol=1e-5)

    with pytest.raises(AdapeftError, match="has an adapter already"):
        found.apply(base)
    applied.revert()
    assert torch.equal(logits(base), before)
    assert [type(module) for module in base.modules()] == [type(module) for module in MODELS[name]().modules()]
    detach(model)
    assert base.state_dict().keys() == model.state_dict().keys()


def test_an_adapter_stands_behind_the_lora_of_its_layer():
    parts = {f"{PLACE}.weight": Lora((12, 19), 0, 2, 2.0), PLACE: Adapter((12,), 3)}
    model = attach(make_bert().eval(), Subset(parts))
    added = attachment_of(model).added
    with torch.no_grad():
        for pieces in added.values():
            for parameter in pieces.values():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    base = make_bert().eval()
    delta(model).apply(base)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)
    detach(model)
    torch.testing.assert_close(logits(model), logits(make_bert()), rtol=0, atol=0)


def test_a_bfloat16_base_has_float32_adapters():
    model = make_bert().bfloat16()
    before = logits(model)
    attach(model, Subset({PLACE: Adapter((12,), 3)}))
    assert all(parameter.dtype == torch.float32 for parameter in attachment_of(model).added[PLACE].values())
    assert torch.equal(logits(model), before)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "name", "width", "message"),
    [
        (make_bert, "bert.encoder.layer.0.output", 12, "is not a linear layer"),
        (make_bert, "bert.encoder.layer.7.output.dense", 12, "is not a linear layer"),
        (make_gpt2, "transformer.h.0.attn.c_attn", 12, "has width 12, but the layer of this model has width 36"),
    ],
)
def test_where_adapters_cannot_be(make, name, width, message):
    model = make()
    with pytest.raises(AdapeftError, match=message):
        attach(model, Subset({name: Adapter((width,), 2)}))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merging_is_refused_and_says_what_to_do(tmp_path):
    model = attach(make_bert(), Subset({PLACE: Adapter((12,), 2)}))
    with pytest.raises(AdapeftError, match=f"1 adapters, such as the one behind '{PLACE}'.*call Delta.apply"):
        merge(delta(model), str(tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "has a bottleneck of 0"), (-2, "rank: Input should be greater than or equal to 0")]
)
def test_a_bottleneck_below_one_is_refused_when_loading(rank, said, tmp_path):
    Subset({PLACE: Adapter((12,), rank)}).save(tmp_path / "s")
    with pytest.raises(AdapeftError, match=said):
        Subset.load(tmp_path / "s")


def test_keys_that_do_not_go_together():
    with pytest.raises(AdapeftError, match=r"select\.placement = houlsby: is an option of method adapter"):
        parse_select({"method": "lora", "placement": "houlsby"})
    with pytest.raises(AdapeftError, match=r"select\.groups = element: adapter chooses by tensor"):
        parse_select({"method": "adapter", "groups": "element"})

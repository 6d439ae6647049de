"""Tests that a new kind of part needs only one class and one line in the registry."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapeft import Delta, attach, delta, detach, merge, save_for_peft, sum_of, unfrozen_parameters
from adapeft.errors import AdapeftError
from adapeft.parts.layers.leaves import Held, LeafPart, add_leaves
from adapeft.parts.part import Attached, Part, PartAndValues, Site
from adapeft.parts.registry import KINDS
from adapeft.parts.rule import DIFFERENCE
from adapeft.subset.subset import Subset
from tests.oracles.leaves import logits, train, weights
from tests.oracles.merged import save_base
from tests.support.tiny import make_gpt2

BLOCK = "transformer.h.0"
NAMES = [f"{BLOCK}.attn.c_attn.weight", f"{BLOCK}.mlp.c_fc.weight", f"{BLOCK}.ln_1.weight"]


class Shift(Part, LeafPart):
    """One number added to all elements of a parameter."""

    kind = "shift"
    leaf_names = (DIFFERENCE,)

    @property
    def count(self) -> int:
        return 1

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (1,)

    def difference(self, values: Tensor) -> Tensor:
        return values.expand(self.shape)

    def attach(self, site: Site) -> Attached:
        leaf = nn.Parameter(torch.zeros(1))
        added = [add_leaves(module, name, self, {DIFFERENCE: leaf}) for module, name in site.places]
        return Attached({"": (site.places[0][0], added[0][DIFFERENCE])})

    def buffers(self, is_linear: bool) -> dict[str, Tensor]:
        return {}

    def added_to(self, parameter: Tensor, held: Held, training: bool) -> Tensor:
        return parameter + held.leaves[0].to(parameter.dtype)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held, training: bool, transposed: bool
    ) -> Tensor:
        total = self.added_to(weight, held, training)
        return F.linear(x, total.t() if transposed else total, bias)

    def merged(self, leaves: Sequence[Tensor]) -> PartAndValues:
        return self, leaves[0]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(KINDS, "shift", Shift)


def attached() -> tuple[nn.Module, Subset]:
    model = make_gpt2()
    subset = Subset({name: Shift(tuple(model.get_parameter(name).shape)) for name in NAMES})
    return attach(model, subset), subset


def test_from_a_subset_to_a_checkpoint(tmp_path):
    model, subset = attached()
    subset.save(tmp_path / "subset.safetensors")
    assert Subset.load(tmp_path / "subset.safetensors").parts == subset.parts
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == len(NAMES)
    train(model)
    delta(model, {"model": {"name": "base", "task": "causal-lm", "labels": {}}}).save(tmp_path / "delta.safetensors")
    found, base = Delta.load(tmp_path / "delta.safetensors"), make_gpt2()
    before, expected = weights(base), logits(model)
    assert all(change.values.shape == (1,) and change.has_moved for change in found.changes.values())
    applied = found.apply(base)
    torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-6)
    for name in NAMES:
        assert torch.equal(base.get_parameter(name), before[name] + found.changes[name].values)
    applied.revert()
    assert all(torch.equal(value, before[name]) for name, value in weights(base).items())
    merged = merge(found, save_base(base, tmp_path / "base"), tmp_path / "merged")
    torch.testing.assert_close(logits(type(base).from_pretrained(merged)), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(type(base).from_pretrained(tmp_path / "saved")), expected, rtol=1e-5, atol=1e-6)
    detach(model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_sums():
    model, _ = attached()
    train(model)
    found = delta(model)
    twice = sum_of({"a": found, "b": found}, [1.0, 1.0])
    for name, change in found.changes.items():
        total = twice.changes[name].part.difference(twice.changes[name].values)
        assert torch.equal(total, (2 * change.values).expand(change.part.shape))


def test_formats_that_have_no_place_for_it_refuse_it(tmp_path):
    model, subset = attached()
    train(model)
    found = delta(model, {"model": {"name": "base", "task": "causal-lm", "labels": {}}})
    with pytest.raises(AdapeftError, match=rf"the delta changes shift of '{NAMES[0]}', a parameter of Conv1D: PEFT"):
        save_for_peft(found, save_base(make_gpt2(), tmp_path / "base"), tmp_path / "peft")
    with pytest.raises(AdapeftError, match=rf"'{NAMES[0]}' is trained as shift"):
        unfrozen_parameters(subset)

"""Tests that changes lost to rounding in a coarse dtype are counted exactly and warned about everywhere."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapeft import AdapeftError, Delta, Deltas, attach, merge, save_for_peft
from adapeft.errors import RoundingWarning
from adapeft.model.fingerprint import fingerprint_model
from adapeft.model.rounding import Rounding
from adapeft.parts.change import Change
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.oracles.deltas import dense_of
from tests.oracles.leaves import logits
from tests.oracles.merged import LANGUAGE
from tests.support.tiny import make_gpt2

QKV, PROJECTION = "transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"
PARTS = {
    QKV: Rows((12, 36), torch.tensor([1, 5, 30]), 1),
    PROJECTION: Elements((48, 12), torch.arange(0, 576, 3)),
    "transformer.h.0.mlp.c_fc.weight": Lora((12, 48), 1, 2, 2.0),
    "transformer.ln_f.bias": Whole((12,)),
}


def small_delta(model: nn.Module, size: float) -> Delta:
    """Return differences of about ``size``, as a small learning rate leaves them; a third of each change is zero."""
    generator = torch.Generator().manual_seed(2)
    changes = {}
    for name, part in PARTS.items():
        shape = {"rows": (3, 12), "elements": (192,), "lora": (part.count,), "tensor": (12,)}[part.kind]
        values = torch.randn(shape, generator=generator) * (size**0.5 if part.kind == "lora" else size)
        values.view(-1)[::3] = 0
        changes[name] = Change(part, values)
    return Delta(changes, {}, fingerprint_model(model), {"model": LANGUAGE, "method": "random"})


def make(dtype: torch.dtype) -> nn.Module:
    return make_gpt2().to(dtype)


def counted(model: nn.Module, delta: Delta, dtype: torch.dtype) -> Rounding:
    """Count by dense sums, entry by entry."""
    entries = lost = 0
    for name, change in delta.changes.items():
        base, difference = model.get_parameter(name).detach(), dense_of(change).float()
        after = (base.float() + difference).to(dtype)
        entries += int((difference != 0).sum())
        lost += int(((difference != 0) & (after == base.to(dtype))).sum())
    return Rounding(entries, lost, dtype)


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_counts_what_it_loses(dtype, size, tmp_path):
    base = make(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    delta, expected = small_delta(base, size), counted(base, small_delta(base, size), dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge(delta, str(tmp_path / "base"), tmp_path / "out")
    said = [str(warning.message) for warning in caught if warning.category is RoundingWarning]
    assert said == ([expected.message(said[0].partition(". ")[2])] if expected.lost else [])
    report = json.loads((tmp_path / "out" / "adapeft_merge.json").read_text())
    assert report["rounding"] == {"entries": expected.entries, "lost": expected.lost}
    assert report["fingerprint"] == delta.fingerprint
    if size == 1e-5:
        assert 0.5 * expected.entries < expected.lost
        assert "--dtype float32" in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_keeps_all(dtype, tmp_path):
    base = make(dtype)
    base.save_pretrained(tmp_path / "base")
    delta = small_delta(base, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundingWarning)
        merge(delta, str(tmp_path / "base"), tmp_path / "out", dtype="float32")
        exact = make(dtype).float()
        delta.apply(exact)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, merged.get_parameter(name)) for name, value in exact.named_parameters())
    torch.testing.assert_close(logits(merged), logits(exact), rtol=0, atol=0)


def test_a_float32_base_written_coarser(tmp_path):
    base = make_gpt2()
    base.save_pretrained(tmp_path / "base")
    delta = small_delta(base, 1e-5)
    expected = counted(base, delta, torch.bfloat16)
    with pytest.warns(RoundingWarning, match=f"{expected.lost:,} of the delta's {expected.entries:,} entries are lost"):
        merge(delta, str(tmp_path / "base"), tmp_path / "out", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    with pytest.raises(AdapeftError, match="--dtype int8: give one of float32, bfloat16, float16"):
        merge(delta, str(tmp_path / "base"), tmp_path / "other", dtype="int8")


def test_applying_and_swapping_warn():
    model = make(torch.bfloat16)
    delta = small_delta(model, 1e-5)
    expected = counted(model, delta, torch.bfloat16)
    message = f"{expected.lost:,} of the delta's {expected.entries:,} entries are lost.*Load the base in float32"
    with pytest.warns(RoundingWarning, match=message):
        delta.apply(model).revert()
    with pytest.warns(RoundingWarning, match=message), Deltas(model, {"one": delta}) as deltas:
        deltas.use("one")


def test_modules_that_peft_saves_whole_warn(tmp_path):
    base = make(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    delta = small_delta(base, 1e-5)
    whole = {name: change for name, change in delta.changes.items() if change.part.kind == "tensor"}
    delta = Delta(whole, {}, delta.fingerprint, delta.description)
    expected = counted(base, delta, torch.bfloat16)
    assert expected.lost
    with pytest.warns(RoundingWarning, match=f"{expected.lost:,} of the delta's {expected.entries:,} entries"):
        save_for_peft(delta, str(tmp_path / "base"), tmp_path / "peft")


def test_training_whole_tensors_in_a_coarse_dtype_warns():
    subset = Subset({"transformer.ln_f.bias": PARTS["transformer.ln_f.bias"]}, ("transformer.ln_f.weight",))
    message = r"2 whole tensors with 24 parameters, such as 'transformer.ln_f.weight', are trained in bfloat16: a step "
    with pytest.warns(RoundingWarning, match=message + r"below 0\.0039 of a weight"):
        attach(make(torch.bfloat16), subset)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundingWarning)
        attach(make_gpt2(), subset)
        attach(make(torch.bfloat16), Subset({QKV: PARTS[QKV]}))

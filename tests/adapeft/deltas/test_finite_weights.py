"""Deltas, sums of deltas, merged weights and adapters are finite, or rejected with the parameter's name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapeft import AdapeftError, Delta, attach, merge, save_for_peft
from adapeft.deltas.arithmetic import interpolation, scaled, sum_of
from adapeft.deltas.extract import extract_delta
from adapeft.files.artifact import load_tensors, save_tensors
from adapeft.tune.attachment import attachment_of
from tests.adapeft.deltas.test_merge import CLASSIFIER, save
from tests.oracles.leaves import make_subset, trained_delta, weights
from tests.support.tiny import make_bert

KINDS = ["row", "element", "tensor", "mixed"]


def good(kind: str = "mixed") -> Delta:
    return trained_delta(make_bert, kind, model=CLASSIFIER)[0]


def spoilt(delta: Delta, value: float = math.nan) -> tuple[str, Delta]:
    """Return the name of the last changed parameter, and the delta with one of its values replaced."""
    name, change = list(delta.changes.items())[-1]
    values = change.values.clone()
    values.view(-1)[-1] = value
    return name, replace(delta, changes={**delta.changes, name: replace(change, values=values)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_is_not_saved_loaded_or_merged(kind, value, tmp_path):
    name, bad = spoilt(good(kind), value)
    path = tmp_path / "delta.safetensors"
    with pytest.raises(AdapeftError, match=rf"delta\.safetensors: '{name}' holds 1 of .* values that are not finite"):
        bad.save(path)
    assert not path.exists()
    good(kind).save(path)
    tensors, description = load_tensors(path, "delta")
    key = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[key].view(-1)[0] = value
    save_tensors(path, "delta", tensors, description)
    with pytest.raises(AdapeftError, match=rf"delta\.safetensors: '{key}' holds 1 of"):
        Delta.load(path)
    with pytest.raises(AdapeftError, match=rf"the delta: '{name}' holds 1 of"):
        merge(bad, str(save(make_bert(), tmp_path / "base")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_new_head_that_is_not_finite_is_not_saved(tmp_path):
    delta = good()
    name = next(iter(delta.new))
    bad = replace(delta, new={**delta.new, name: torch.full_like(delta.new[name], math.nan)})
    with pytest.raises(AdapeftError, match=f"'{name}' holds"):
        bad.save(tmp_path / "delta.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_diverged_has_no_delta(kind):
    model = make_bert()
    attach(model, make_subset(model, kind))
    trained = next(iter(attachment_of(model).trained.values()))
    with torch.no_grad():
        trained.view(-1)[0] = math.inf
    with pytest.raises(
        AdapeftError, match=r"^training diverged: '.*' holds 1 of .* Train again at a lower learning rate"
    ):
        extract_delta(model)


def test_scores_without_a_number_are_not_saved_and_infinite_ones_read_back(tmp_path):
    path = tmp_path / "delta.safetensors"
    with pytest.raises(AdapeftError, match=r"scores\.loss = nan"):
        replace(good(), description={"scores": {"loss": math.nan}}).save(path)
    scores = {"loss": 800.0, "perplexity": math.inf}
    replace(good(), description={"scores": scores}).save(path)
    assert Delta.load(path).description["scores"] == scores


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_that_overflows_is_none(kind):
    deltas = {"a": good(kind)}
    with pytest.raises(AdapeftError, match=r"the sum with weights \[1e\+300\]: '.*' holds .* not finite"):
        sum_of(deltas, [1e300])
    with pytest.raises(AdapeftError, match="the sum with weights"):
        scaled(good(kind), 1e300)
    large = {"a": scaled(good(kind), 1e37), "b": scaled(good(kind), -1e37)}
    with pytest.raises(AdapeftError, match="the interpolation with weights"):
        interpolation(large, [1e3, 1 - 1e3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_overflow_are_not_merged_or_applied(kind, dtype, tmp_path):
    """The delta is finite in float32 but scaled until its weights overflow 16 bits."""
    base = save(make_bert().to(dtype), tmp_path / "base")
    found = trained_delta(lambda: make_bert().to(dtype).float(), kind, model=CLASSIFIER)[0]
    fitting = replace(found, fingerprint=_fingerprint(make_bert().to(dtype), found))
    largest = max(float(change.values.abs().max()) for change in found.changes.values())
    large = scaled(fitting, 3.4e38 / largest if dtype == torch.bfloat16 else 1e6 / largest)
    with pytest.raises(AdapeftError, match=rf"base plus delta in {dtype}: '.*' holds .* merge in float32"):
        merge(large, str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = make_bert().to(dtype)
    before = weights(model)
    with pytest.raises(AdapeftError, match="base plus delta in"):
        large.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_dtype_that_holds_no_such_weight_is_refused(tmp_path):
    """The delta is not at fault: the base itself does not fit into float16."""
    model = make_bert()
    with torch.no_grad():
        model.get_parameter("bert.embeddings.LayerNorm.bias")[0] = 1e6
    found, _ = trained_delta(lambda: _copy(model), "row", model=CLASSIFIER)
    base = save(model, tmp_path / "base")
    merge(found, str(base), tmp_path / "wide")
    with pytest.raises(
        AdapeftError, match=r"merging in torch\.float16: 'bert\.embeddings\.LayerNorm\.bias' holds 1 of"
    ):
        merge(found, str(base), tmp_path / "out", dtype="float16")


def test_a_base_that_is_not_finite_is_named(tmp_path):
    """The base is checked whether or not the delta changes that parameter."""
    name = "bert.encoder.layer.1.output.dense.bias"
    model = make_bert()
    with torch.no_grad():
        model.get_parameter(name)[0] = math.nan
    found, _ = trained_delta(make_bert, "row", model=CLASSIFIER)
    base = save(model, tmp_path / "base")
    with pytest.raises(AdapeftError, match=rf"the base model: '{name}' holds 1 of .* Its checkpoint is damaged"):
        merge(replace(found, fingerprint=_fingerprint(model, found)), str(base), tmp_path / "out")


def test_an_adapter_that_is_not_finite_is_not_imported(tmp_path):
    from adapeft.formats.peft.adapter import read_adapter

    base = save(make_bert(), tmp_path / "base")
    save_for_peft(good("mixed"), str(base), tmp_path / "peft")
    path = next((tmp_path / "peft").rglob("adapter_model.safetensors"))
    tensors = load_file(path)
    name = next(key for key, value in tensors.items() if value.is_floating_point())
    tensors[name].view(-1)[0] = math.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapeftError, match=r"holds 1 of .* not finite"):
        read_adapter(path.parent)


def _copy(model):
    copied = make_bert()
    copied.load_state_dict(model.state_dict())
    return copied


def _fingerprint(model, delta):
    from adapeft.model.fingerprint import fingerprint_model

    return fingerprint_model(model, delta.new)

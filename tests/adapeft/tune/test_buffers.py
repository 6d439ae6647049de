"""Tests of buffers that training changes: trained, applied, merged and exported models compute the same."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForSequenceClassification, LevitConfig, LevitForImageClassification

from adapeft import AdapeftError, Delta, Deltas, attach, delta, detach, interpolation, merge, save_for_peft, sum_of
from adapeft.deltas.conflict import conflict_of
from adapeft.files.artifact import load_tensors, save_tensors
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.oracles.leaves import logits
from tests.oracles.merged import CLASSIFIER
from tests.support.normalized import make_normalized
from tests.support.tiny import make_batches, make_bert

CHANGED = {
    "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "codebook.codes", "codebook.seen",
}  # fmt: skip
DENSE = {"dense.weight": Rows((8, 8), torch.tensor([1, 4]))}


def train(model: nn.Module, steps: int = 4) -> None:
    """Train in training mode, as any trainer does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in make_batches(make_bert())[:steps]:
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(parts: dict[str, Part] = DENSE, steps: int = 4) -> tuple[Delta, nn.Module]:
    model = attach(make_normalized(), Subset(parts))
    train(model, steps)
    return delta(model, {"model": CLASSIFIER}), model


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(make_batches(make_bert())[0]["input_ids"]).logits


def test_a_module_wrapped_since_attach_keeps_the_names_of_its_buffers():
    model = attach(make_normalized(), Subset(DENSE))
    model.norm = checkpoint_wrapper(model.norm)
    train(model)
    assert set(delta(model).buffers) == CHANGED


def test_attached_applied_swapped_and_merged_are_one(tmp_path):
    found, attached = trained()
    assert set(found.buffers) == CHANGED
    assert found.buffers["norm.num_batches_tracked"].dtype == torch.int64
    expected = outputs(attached)
    found.save(tmp_path / "delta")
    loaded = Delta.load(tmp_path / "delta")
    model = make_normalized()
    before, base = outputs(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert (before - expected).abs().max() > 1e-2
    applied = loaded.apply(model)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-6)
    applied.revert()
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(buffer, base[name]) for name, buffer in model.named_buffers())
    with Deltas(model, {"one": loaded}) as deltas:
        deltas.use("one")
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs(model), before)
    make_normalized().save_pretrained(tmp_path / "base", max_shard_size="1KB")
    merge(loaded, str(tmp_path / "base"), tmp_path / "out")
    merged, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-6)


def test_lora_on_a_layer_and_image_models():
    """A wrapped layer's buffers keep their names, and the real model of the report computes what was trained."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]}
        config = LevitConfig(image_size=64, depths=[1, 1, 1], mlp_ratio=[2, 2, 2], drop_path_rate=0, **sizes)
        return LevitForImageClassification(config)

    model = make()
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("linear.weight"))
    attach(model, Subset({name: Lora(tuple(weight.shape), 0, 2, 2.0)}))
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)) + 1
    for _ in range(3):
        model.train()(images)
    found = delta(model)
    assert len(found.buffers) > 50
    fresh = make()
    found.apply(fresh)
    with torch.no_grad():
        expected, other = model.eval()(images).logits, make().eval()(images).logits
        torch.testing.assert_close(fresh.eval()(images).logits, expected, rtol=1e-4, atol=1e-6)
    assert (other - expected).abs().max() > 1e-3


def test_a_spectral_norm_on_another_layer():
    def make() -> nn.Module:
        model = make_normalized()
        nn.utils.parametrizations.spectral_norm(model.dense)
        return model

    model = attach(make(), Subset({"classifier.weight": Rows((3, 8), torch.tensor([1]))}))
    train(model)
    found, fresh = delta(model), make()
    assert {"dense.parametrizations.weight.0._u", "dense.parametrizations.weight.0._v"} <= set(found.buffers)
    found.apply(fresh)
    torch.testing.assert_close(outputs(fresh), outputs(model), rtol=1e-5, atol=1e-6)


def test_peft_saves_the_module_with_its_statistics(tmp_path):
    found, attached = trained()
    make_normalized().save_pretrained(tmp_path / "base")
    save_for_peft(found, str(tmp_path / "base"), tmp_path / "peft")
    loaded = PeftModel.from_pretrained(make_normalized(), str(tmp_path / "peft"))
    torch.testing.assert_close(outputs(loaded.base_model.model), outputs(attached), rtol=1e-5, atol=1e-5)


def test_detaching_gives_the_base_back():
    model = make_normalized()
    before = outputs(model)
    attach(model, Subset(DENSE))
    train(model)
    detach(model)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_statistics_are_no_part_of_a_delta(dtype):
    model = attach(make_normalized(), Subset(DENSE)).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**make_batches(make_bert())[0]).loss.backward()
    optimizer.step()
    assert delta(model.to(dtype)).buffers == {}


def test_statistics_keep_the_dtype_of_the_base():
    _, model = trained()
    found = delta(model.bfloat16())
    assert found.buffers.keys() == CHANGED
    assert all(value.dtype == make_normalized().get_buffer(name).dtype for name, value in found.buffers.items())


def test_sums_and_means_of_deltas(tmp_path):
    (a, _), (b, _) = trained(steps=2), trained(steps=4)
    with pytest.raises(AdapeftError, match=r"new parameters and buffers are not differences .* heads='a'"):
        sum_of({"a": a, "b": b}, [1, 1])
    total = sum_of({"a": a, "b": b}, [1, 1], heads="b")
    assert total.new == {}
    assert total.buffers.keys() == CHANGED
    assert all(torch.equal(value, b.buffers[name]) for name, value in total.buffers.items())
    mean = interpolation({"a": a, "b": b}, [0.5, 0.5])
    expected = (a.buffers["norm.running_mean"].double() + b.buffers["norm.running_mean"].double()) / 2
    torch.testing.assert_close(mean.buffers["norm.running_mean"], expected.float(), rtol=2**-23, atol=0)
    assert mean.buffers["norm.num_batches_tracked"] == 3
    assert set(conflict_of(a, b).heads) == CHANGED


def test_an_older_file_has_none(tmp_path):
    found, _ = trained()
    found.save(tmp_path / "delta")
    tensors, content = load_tensors(tmp_path / "delta", "delta")
    older = {key: value for key, value in content.items() if key not in ("buffers", "provenance")}
    save_tensors(
        tmp_path / "older", "delta", {key: t for key, t in tensors.items() if not key.endswith(".buffer")}, older
    )
    assert Delta.load(tmp_path / "older").buffers == {}


def test_a_buffer_that_grew_is_refused():
    model = attach(make_normalized(), Subset(DENSE))
    model.codebook.codes = torch.zeros(5, 8)
    with pytest.raises(AdapeftError, match=r"'codebook.codes' had shape \(4, 8\)"):
        delta(model)


def test_a_model_without_the_buffer_is_refused():
    found, _ = trained()
    other = make_normalized()
    other.codebook = nn.Identity()
    with pytest.raises(AdapeftError, match=r"replaces the buffer 'codebook.codes' of shape \(4, 8\)"):
        found.apply(other)


def test_a_model_of_text_has_none():
    model = attach(make_bert(), Subset({"bert.pooler.dense.bias": Whole((12,))}))
    train(model)
    assert delta(model).buffers == {}
    assert logits(model).shape == (5, 3)

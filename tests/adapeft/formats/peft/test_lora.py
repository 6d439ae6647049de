"""Exported LoRA, read by a loader that uses only r, lora_alpha and the tensors, and by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from adapeft import load_from_peft, save_for_peft
from adapeft.formats.peft.lora import target_modules
from adapeft.model.structure import describe_parameters
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from tests.adapeft.tune.test_buffers import outputs, trained
from tests.oracles.deltas import dense_of
from tests.oracles.leaves import logits
from tests.oracles.merged import random_delta, save_base, summed
from tests.oracles.parts import MODELS
from tests.support.normalized import make_normalized
from tests.support.tiny import make_bert

PREFIX = "base_model.model."
LORA = {
    "one rank": lambda number, shape: (4, 16.0),
    "ranks that are alike": lambda number, shape: (3 + number % 2, 3.0),
    "one large rank": lambda number, shape: (6 if number == 2 else 1, 2.5),
}
ROWS = {"alike": lambda number, size: 4, "one of many": lambda number, size: 5 if number == 2 else 1}


def parts_of(model: nn.Module, kind: str) -> dict[str, Part]:
    infos = [info for info in describe_parameters(model) if info.is_linear and info.layer >= 0]
    parts = {}
    for number, info in enumerate(infos):
        if kind in LORA:
            rank, alpha = LORA[kind](number, info.shape)
            parts[info.name] = Lora(info.shape, info.output_dim, rank, alpha)
        else:
            count = ROWS[kind](number, info.shape[info.output_dim])
            parts[info.name] = Rows(info.shape, torch.arange(count) + 1, info.output_dim)
    return parts


def plain_reader(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return weight → (B A · lora_alpha / r, the same of magnitudes), float64 [out, in], all that vLLM reads."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        assert len(a) == b.shape[1] <= config["r"]
        layer = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        assert isinstance(config["target_modules"], str) or any(
            f".{layer}".endswith(f".{end}") for end in config["target_modules"]
        )
        found[f"{layer}.weight"] = (scaling * b @ a, abs(scaling) * b.abs() @ a.abs())
    return found


@pytest.mark.parametrize("kind", [*LORA, *ROWS])
@pytest.mark.parametrize("name", MODELS)
def test_a_reader_of_r_alpha_and_tensors(name, kind, tmp_path):
    model = MODELS[name]()
    delta = random_delta(model, parts_of(model, kind))
    (folder,) = save_for_peft(delta, save_base(MODELS[name](), tmp_path / "base"), tmp_path / "peft")
    read = plain_reader(folder)
    assert read.keys() == delta.changes.keys()
    for key, change in delta.changes.items():
        expected, (product, magnitude) = dense_of(change), read[key]
        if change.part.dim == 1:  # Conv1D
            product, magnitude = product.t(), magnitude.t()
        # Each element of B, scaled in float64, is rounded once to 24 bits.
        assert ((product - expected).abs() <= 2**-24 * magnitude).all()
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    largest = max(len(value) for key, value in tensors.items() if "lora_A" in key)
    assert config["r"] == config["lora_alpha"] == largest
    padded = kind not in ("one large rank", "one of many")
    assert (config["rank_pattern"] == config["alpha_pattern"] == {}) == padded
    loaded = PeftModel.from_pretrained(MODELS[name](), folder)
    torch.testing.assert_close(logits(loaded.base_model.model), logits(summed(model, delta)), rtol=1e-5, atol=1e-5)
    back = load_from_peft(folder, str(tmp_path / "base"))
    for key, change in delta.changes.items():
        assert ((dense_of(back.changes[key]) - dense_of(change)).abs() <= 2**-22 * read_bound(read[key], change)).all()
        if kind in LORA:
            assert back.changes[key].part.rank == change.part.rank, "what is padded is no part of the delta"


def read_bound(read: tuple[Tensor, Tensor], change) -> Tensor:
    return read[1].t() if change.part.dim == 1 else read[1]


@pytest.mark.parametrize("kind", ["ranks that are alike", "alike"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_adapter_itself(name, kind, tmp_path):
    model = MODELS[name]()
    delta = random_delta(model, parts_of(model, kind))
    (folder,) = save_for_peft(delta, save_base(MODELS[name](), tmp_path / "base"), tmp_path / "peft")
    loaded = MODELS[name]()
    before = logits(loaded)
    loaded.load_adapter(str(folder))
    found = logits(loaded)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, logits(summed(model, delta)), rtol=1e-5, atol=1e-5)


def test_the_file_is_padded_up_to_half_as_much_again(tmp_path):
    """With two equal matrices: 6 columns instead of 4 are padded, 8 instead of 5 are not."""
    names = [f"bert.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key")]
    base = save_base(make_bert(), tmp_path / "base")
    for largest, is_padded in ((3, True), (4, False)):
        ranks = zip(names, (largest, 1), strict=True)
        parts = {name: Lora((12, 12), 0, rank, 1.0) for name, rank in ranks}
        (folder,) = save_for_peft(random_delta(make_bert(), parts), base, tmp_path / f"peft-{largest}")
        assert (json.loads((folder / "adapter_config.json").read_text())["rank_pattern"] == {}) == is_padded


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (lambda path: path.endswith(("query", "value")), ["query", "value"]),
        (lambda path: path.endswith("layer.1.attention.self.query"), ["bert.encoder.layer.1.attention.self.query"]),
        (lambda path: path.endswith("intermediate.dense"), None),
        (lambda path: path.endswith(("dense", "key")), ["dense", "key"]),
    ],
)
def test_names_where_they_are_exact(chosen, expected, tmp_path):
    model = make_bert()
    infos = [info for info in describe_parameters(model) if info.is_linear and not info.name.startswith("classifier")]
    parts = {i.name: Lora(i.shape, 0, 2, 2.0) for i in infos if chosen(i.name.removesuffix(".weight"))}
    (folder,) = save_for_peft(random_delta(model, parts), save_base(make_bert(), tmp_path / "base"), tmp_path / "peft")
    found = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    paths = sorted(name.removesuffix(".weight") for name in parts)
    assert sorted(found) == (paths if expected is None else expected)
    loaded = PeftModel.from_pretrained(make_bert(), folder)
    wrapped = [name for name, module in loaded.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    assert sorted(wrapped) == paths


def test_a_pattern_where_a_path_ends_another():
    model = nn.Module()
    model.proj, model.inner = nn.Linear(2, 2), nn.ModuleDict({"proj": nn.Linear(2, 2)})
    assert target_modules(["proj"], model, "") == "proj"
    assert target_modules(["inner.proj"], model, "") == ["inner.proj"]
    assert target_modules(["proj", "inner.proj"], model, "") == ["proj"]


def test_buffers_there_and_back(tmp_path):
    delta, attached = trained()
    make_normalized().save_pretrained(tmp_path / "base")
    (folder,) = save_for_peft(delta, str(tmp_path / "base"), tmp_path / "peft")
    back = load_from_peft(folder, str(tmp_path / "base"), "sequence-classification")
    assert back.buffers.keys() == delta.buffers.keys()
    model = make_normalized()
    back.apply(model)
    torch.testing.assert_close(outputs(model), outputs(attached), rtol=1e-5, atol=1e-6)

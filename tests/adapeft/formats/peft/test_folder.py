"""Deltas as PEFT folders: the loaded model has the outputs of base + delta; other parts are rejected by name."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.shira import ShiraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import BertForMultipleChoice, DistilBertConfig, DistilBertForSequenceClassification

from adapeft import AdapeftError
from adapeft.formats.peft.folder import save_for_peft
from adapeft.formats.peft.parts import sort_for_peft
from adapeft.model.structure import describe_parameters, new_parameters
from adapeft.parts.adapter import Adapter
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from tests.adapeft.tune import test_architectures as architectures
from tests.oracles.leaves import logits
from tests.oracles.merged import random_delta, save_base, summed
from tests.oracles.parts import MODELS, make_llama
from tests.support.through_peft import with_two_adapters
from tests.support.tiny import make_bert, make_gpt2

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
OUTPUT = "bert.encoder.layer.1.output.dense.weight"
ROW = torch.tensor([3])


def parts_of(model: nn.Module, kind: str) -> dict[str, Part]:
    """Return parts of the whole model, as runs make them: ``rows``, ``lora`` or ``elements``, and whole vectors."""
    parts, numbers = {}, itertools.count()
    for info in describe_parameters(model):
        if info.name.startswith("classifier"):
            continue
        dim = info.output_dim or 0
        rows = torch.arange(1, info.shape[dim], 3)
        if len(info.shape) == 1:
            parts[info.name] = Whole(info.shape)
        elif kind == "elements" and info.is_linear:
            parts[info.name] = Elements(info.shape, torch.arange(0, info.count, 10 + next(numbers) % 4))
        elif kind == "lora" and info.is_linear and (number := next(numbers)) % 3:
            parts[info.name] = Lora(info.shape, dim, 1 + number % 4, 3.0)
        elif kind != "elements":
            parts[info.name] = Rows(info.shape, rows, dim)
    return parts


def check(make, parts: dict[str, Part], tmp_path: Path) -> nn.Module:
    """Export, load with PEFT, and compare outputs with the dense sum and with the base; return the loaded model."""
    delta = random_delta(make(), parts)
    (folder,) = save_for_peft(delta, save_base(make(), tmp_path / "base"), tmp_path / "peft")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "peft"}
    loaded = PeftModel.from_pretrained(make(), folder)
    expected = logits(summed(make(), delta))
    torch.testing.assert_close(logits(loaded.base_model.model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(make()) - expected).abs().max() > 0.01
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded.base_model.model), logits(make()))
    return loaded


@pytest.mark.parametrize("kind", ["rows", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_lora_biases_and_embeddings(name, kind, tmp_path):
    parts = parts_of(MODELS[name](), kind)
    assert {part.kind for part in parts.values()} == {"tensor", "rows", kind}
    loaded = check(MODELS[name], parts, tmp_path)
    assert any(isinstance(module, LoraLayer) for module in loaded.modules())
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len([key for key in tensors if key.endswith(".trainable_tokens_delta")]) > 0
    assert any(key.endswith("lora_B.bias") for key in tensors) == (name != "llama")


@pytest.mark.parametrize("kind", ["rows", "lora"])
def test_multiple_choice(kind, tmp_path):
    """Its new layer, which scores a choice, is saved whole, although PEFT has no type for the task."""

    def make():
        model = BertForMultipleChoice(make_bert().config).eval()
        model.bert.load_state_dict(make_bert().bert.state_dict())
        torch.nn.init.constant_(model.classifier.weight, 0.1)
        return model

    def scores(model):
        return model(torch.arange(1, 25).view(2, 3, 4)).logits

    described = {"name": "base", "task": "multiple-choice", "labels": {}}
    delta = replace(random_delta(make(), parts_of(make(), kind)), description={"model": described})
    assert set(delta.new) == {"classifier.weight", "classifier.bias"}
    (folder,) = save_for_peft(delta, save_base(make(), tmp_path / "base"), tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"][-1]) == (None, "classifier")
    loaded = PeftModel.from_pretrained(make(), folder).eval()
    expected = scores(summed(make(), delta))
    assert expected.shape == (2, 3)
    torch.testing.assert_close(scores(loaded), expected, rtol=1e-5, atol=1e-5)
    assert (scores(make()) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["roberta", "qwen2"])
def test_other_families(name, tmp_path):
    def make():
        return architectures.make(name)[0]

    new = new_parameters(make())
    check(make, {key: part for key, part in parts_of(make(), "rows").items() if key not in new}, tmp_path)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_columns(make, tmp_path):
    infos = [info for info in describe_parameters(make()) if info.is_linear and info.layer >= 0]
    parts = {i.name: Rows(i.shape, torch.arange(0, i.shape[1 - i.output_dim], 2), 1 - i.output_dim) for i in infos}
    check(make, parts, tmp_path)


@pytest.mark.parametrize("make", [make_bert, make_llama])
def test_elements_are_shira(make, tmp_path):
    parts = {name: part for name, part in parts_of(make(), "elements").items() if "bias" not in name}
    loaded = check(make, parts, tmp_path)
    layers = [module for module in loaded.modules() if isinstance(module, ShiraLayer)]
    assert len(layers) == sum(part.kind == "elements" for part in parts.values()) > 5
    assert len({len(layer.shira_weight["default"]) for layer in layers}) > 1
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(summed(make(), random_delta(make(), parts))))


@pytest.mark.parametrize(
    ("indices", "rank"),
    [
        (torch.tensor([0, 7, 35, 40, 396]), 3),  # in three rows and four columns
        (torch.tensor([4, 40, 76, 112]), 1),  # in one column
        (torch.arange(0, 432, 13), None),  # in every row
    ],
)
def test_elements_of_conv1d_are_lora_or_the_whole_matrix(indices, rank, tmp_path):
    name = "transformer.h.0.attn.c_attn"
    check(make_gpt2, {f"{name}.weight": Elements((12, 36), indices)}, tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    if rank:
        assert (config["r"], config["target_modules"], config["modules_to_save"]) == (rank, [name], None)
    else:
        assert config["modules_to_save"] == [name]


@pytest.mark.parametrize(
    ("make", "name"), [(make_bert, "bert.embeddings.word_embeddings.weight"), (make_gpt2, "transformer.wte.weight")]
)
def test_elements_of_embeddings_are_rows_of_tokens(make, name, tmp_path):
    """GPT-2's are tied to the output layer."""
    check(make, {name: Elements((29, 12), torch.tensor([12, 14, 60, 61, 347]))}, tmp_path)
    tokens = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    (rows,) = [value for key, value in tokens.items() if key.endswith(".trainable_tokens_delta")]
    assert rows.shape == (3, 12)


def test_a_matrix_too_dense_for_the_r_of_others_is_saved_whole(tmp_path):
    counts = {QUERY: 1, OUTPUT: 40, OUTPUT.replace("output", "intermediate"): 40, OUTPUT.replace("1", "0"): 200}
    shapes = {name: tuple(make_bert().get_parameter(name).shape) for name in counts}
    check(make_bert, {name: Elements(shapes[name], torch.arange(n)) for name, n in counts.items()}, tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["modules_to_save"] == ["bert.encoder.layer.0.output.dense", "classifier"]


@pytest.mark.parametrize("make", [make_bert, make_llama])
def test_two_adapters_where_one_type_is_not_enough(make, tmp_path):
    parts = parts_of(make(), "elements")
    some = [name for name, part in parts.items() if part.kind == "elements"][::3]
    parts |= {name: Rows(parts[name].shape, torch.tensor([0, 5])) for name in some}
    delta = random_delta(make(), parts)
    folders = save_for_peft(delta, save_base(make(), tmp_path / "base"), tmp_path / "peft")
    assert folders == [tmp_path / "peft" / "shira", tmp_path / "peft" / "lora"]
    loaded = with_two_adapters(make(), tmp_path / "peft")
    expected = logits(summed(make(), delta))
    torch.testing.assert_close(logits(loaded.base_model.model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_whole_tensors_alone(name, tmp_path):
    model = MODELS[name]()
    infos = {info.name: info for info in describe_parameters(model)}
    ends = ("norm.weight", "LayerNorm.bias", "ln_1.weight", "dense.bias", "c_fc.bias", "wte.weight", "up_proj.weight")
    parts = {key: Whole(info.shape) for key, info in infos.items() if key.endswith(ends)}
    positions = [key for key in infos if key.endswith(("position_embeddings.weight", "LayerNorm.weight"))]
    parts |= {key: Elements(infos[key].shape, torch.arange(0, 12, 5)) for key in positions[1:2]}
    check(MODELS[name], parts, tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    whole = [key for key in parts if not key.endswith(("dense.bias", "c_fc.bias"))]
    owners = {key.rpartition(".")[0] for key in whole} | ({"classifier"} if name == "bert" else set())
    assert set(config["modules_to_save"]) == owners | ({"lm_head"} if name == "gpt2" else set())


def test_a_bfloat16_base(tmp_path):
    def make():
        return make_bert().bfloat16()

    delta = random_delta(make(), parts_of(make(), "rows"))
    (folder,) = save_for_peft(delta, save_base(make(), tmp_path / "base"), tmp_path / "peft")
    loaded = PeftModel.from_pretrained(make(), folder)
    torch.testing.assert_close(
        logits(loaded.base_model.model).float(), logits(summed(make(), delta)).float(), rtol=5e-2, atol=5e-2
    )


def test_a_module_named_like_the_end_of_another(tmp_path):
    def make():
        torch.manual_seed(0)
        config = DistilBertConfig(vocab_size=29, dim=12, n_layers=1, n_heads=2, hidden_dim=19, num_labels=3)
        model = DistilBertForSequenceClassification(config)
        model.config.architectures = ["DistilBertForSequenceClassification"]
        return model

    check(make, {"classifier.weight": Whole((3, 12))}, tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "pre_classifier"]
    with pytest.raises(AdapeftError, match="PEFT would save 'pre_classifier' like 'classifier'"):
        sort_for_peft(
            random_delta(
                make(),
                {"classifier.weight": Whole((3, 12)), "pre_classifier.weight": Rows((12, 12), ROW)},
            ),
            make(),
        )


@pytest.mark.parametrize(
    ("make", "parts", "message"),
    [
        *(
            (
                lambda: architectures.make("opt")[0],
                {"model.decoder.embed_positions.weight": part},
                f"{part.kind} of 'model.decoder.embed_positions.weight', a parameter of "
                r"OPTLearnedPositionalEmbedding: .*\(adapeft merge\)",
            )
            for part in (Rows((18, 12), ROW), Elements((18, 12), ROW))
        ),
        (
            make_bert,
            {QUERY.removesuffix(".weight"): Adapter((12,), 2)},
            f"'{QUERY.removesuffix('.weight')}' has an adapter behind it",
        ),
        (
            make_bert,
            {"bert.encoder.layer.7.output.dense.weight": Whole((12, 19))},
            "this model has nothing there",
        ),
        (make_bert, {QUERY: Whole((13, 12))}, r"of shape \(13, 12\); this model has \(12, 12\) there"),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_name(make, parts, message, tmp_path):
    base = save_base(make(), tmp_path / "base")
    with pytest.raises(AdapeftError, match=message):
        save_for_peft(random_delta(make(), parts), base, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_another_base_and_a_folder_that_is_taken(tmp_path):
    delta = random_delta(make_bert(), {QUERY: Whole((12, 12))})
    other = make_bert()
    nn.init.zeros_(other.bert.pooler.dense.weight)
    with pytest.raises(AdapeftError, match="the delta belongs to a base model of fingerprint"):
        save_for_peft(delta, save_base(other, tmp_path / "other"), tmp_path / "peft")
    with pytest.raises(AdapeftError, match="not an empty folder"):
        save_for_peft(delta, save_base(make_bert(), tmp_path / "base"), tmp_path / "base")

"""Tests of ``model.quantization``: what is quantized while loading, its structure without weights, and errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from adapeft import AdapeftError
from adapeft.config.load import parse_select
from adapeft.measure.groups import build_groups, groups_of
from adapeft.model import quantization
from adapeft.model.fingerprint import fingerprint_model
from adapeft.model.load import build_structure, load_model, load_model_config, load_tokenizer
from adapeft.model.quantized import quantized_weights
from adapeft.model.section import Model
from adapeft.model.stand_in import StandIn
from tests.adapeft.model.test_load import CLASSES, TEXT, bert_folder, gpt2_folder, save_tokenizer
from tests.support.quantized import TYPES, scale_bytes
from tests.support.tiny import VOCABULARY, make_bert

__all__ = ["bert_folder", "gpt2_folder"]


@pytest.fixture
def llama_folder(tmp_path):
    """Save a language model whose head is not tied."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="<end>")
    return tmp_path


@pytest.fixture(params=["bert", "gpt2", "llama"])
def base(request):
    """The task of a checkpoint, its folder, and the description of data for it."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    return ("sequence-classification", folder, CLASSES) if request.param == "bert" else ("causal-lm", folder, TEXT)


@pytest.fixture(params=TYPES)
def kind(request):
    return request.param


def load(model: Model, description, always_train=("auto",)):
    """Return the structure without weights, and the loaded model."""
    config = load_model_config(model, description, load_tokenizer(model), always_train)
    return build_structure(config, model.task), load_model(model, config, 0, always_train)


def num_bytes(layer) -> int:
    return layer.weight.nbytes + scale_bytes(layer)


def test_the_structure_is_that_of_the_loaded_model(base, kind):
    task, folder, description = base
    structure, loaded = load(Model(name=str(folder), task=task, quantization=kind), description)
    quantized = quantized_weights(loaded)
    assert set(quantized.values()) == {kind}
    assert quantized_weights(structure) == quantized
    settings = parse_select({"groups": "row", "method": "random"})
    ours, theirs = groups_of(structure, settings), groups_of(loaded, settings)
    assert ours.parameters == theirs.parameters
    assert (ours.always_train, ours.num_total) == (theirs.always_train, theirs.num_total)
    for name in quantized:
        path = name.removesuffix(".weight")
        stand_in = structure.get_submodule(path)
        assert isinstance(stand_in, StandIn)
        assert stand_in.num_bytes == num_bytes(loaded.get_submodule(path))


def test_embeddings_norms_and_heads_stay_as_they_are(base, kind):
    task, folder, description = base
    _, loaded = load(Model(name=str(folder), task=task, quantization=kind), description)
    blocks = [name for name in quantized_weights(loaded) if ".0." in name or ".1." in name]
    assert len(blocks) >= 2 * 4
    assert all(any(part in name for part in (".0.", ".1.", "pooler")) for name in quantized_weights(loaded))
    for name, parameter in loaded.named_parameters():
        assert name in quantized_weights(loaded) or parameter.dtype == torch.float32


def test_what_is_always_trained_is_not_quantized(bert_folder, kind):
    model = Model(name=str(bert_folder), task="sequence-classification", quantization=kind)
    structure, loaded = load(model, CLASSES, ("auto", "*.0.output.dense.weight"))
    assert "bert.encoder.layer.0.output.dense.weight" not in quantized_weights(loaded)
    assert "bert.encoder.layer.1.output.dense.weight" in quantized_weights(loaded)
    assert quantized_weights(structure).keys() == quantized_weights(loaded).keys()
    with pytest.raises(AdapeftError, match=rf"always_train: 1 matrices such as .*1.output.*\({kind}\) and cannot be"):
        build_groups(loaded, "row", always_train=("*.1.output.dense.weight",))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_the_unquantized_checkpoint_does_not_stay_in_memory(bert_folder, kind):
    """Its pages would: those that a process has read of a mapped file count as long as anything is a view of it."""
    mapped = {}
    for asked in (None, kind):
        model = Model(name=str(bert_folder), task="sequence-classification", quantization=asked)
        _, loaded = load(model, CLASSES)
        mapped[asked] = str(bert_folder / "model.safetensors") in Path("/proc/self/maps").read_text()
        del loaded
    assert mapped == {None: True, kind: False}


def test_nf4_computes_in_the_models_dtype_and_keeps_its_codes(llama_folder):
    for dtype in ("float32", "bfloat16"):
        _, loaded = load(Model(name=str(llama_folder), task="causal-lm", quantization="nf4", dtype=dtype), TEXT)
        layer = loaded.model.layers[0].mlp.up_proj
        assert layer.compute_dtype == loaded.dtype == getattr(torch, dtype)
        assert layer.weight.quant_state.nested
        assert not layer.support_avx512bf16_for_cpu


def test_quantizing_changes_the_fingerprint(base):
    task, folder, description = base
    found = [
        fingerprint_model(load(Model(name=str(folder), task=task, quantization=one), description)[1])
        for one in (None, "none", *TYPES)
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def save_quantized(folder, kind):
    """Save a checkpoint that is already quantized, with scales that are not."""
    settings = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    settings = BitsAndBytesConfig(**settings, llm_int8_skip_modules=["lm_head"])
    LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu").save_pretrained(folder)


def test_a_quantized_checkpoint_is_loaded_as_it_is(llama_folder, kind):
    save_quantized(llama_folder, kind)
    found = []
    for asked in (None, kind):
        structure, loaded = load(Model(name=str(llama_folder), task="causal-lm", quantization=asked), TEXT)
        assert set(quantized_weights(loaded).values()) == {kind}
        assert quantized_weights(structure) == quantized_weights(loaded)
        stand_in, layer = (model.model.layers[1].self_attn.q_proj for model in (structure, loaded))
        assert stand_in.num_bytes == num_bytes(layer)
        found.append(fingerprint_model(loaded))
    assert found[0] == found[1]
    other = next(one for one in TYPES if one != kind)
    for asked in ("none", other):
        said = rf"model.quantization = {asked}: the checkpoint .* is already quantized \({kind}\)"
        with pytest.raises(AdapeftError, match=said):
            load(Model(name=str(llama_folder), task="causal-lm", quantization=asked), TEXT)


def test_another_librarys_quantization_is_not_changed(llama_folder):
    path = llama_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    model = Model(name=str(llama_folder), task="causal-lm")
    config = load_model_config(model, TEXT, load_tokenizer(model))
    assert not quantized_weights(build_structure(config, "causal-lm"))
    with pytest.raises(AdapeftError, match=r"is already quantized \(gptq\)"):
        load(model.model_copy(update={"quantization": "nf4"}), TEXT)


def test_a_missing_library_is_one_error_with_its_remedy(llama_folder, monkeypatch):
    said = "needs bitsandbytes, and it is missing or too old: pip install 'adapeft\\[quantization\\]'"
    asked = Model(name=str(llama_folder), task="causal-lm", quantization="nf4")
    with monkeypatch.context() as patched:
        patched.setattr(quantization, "is_bitsandbytes_available", lambda: False)
        with pytest.raises(AdapeftError, match=f"model.quantization = nf4, which {said}"):
            load(asked, TEXT)
    save_quantized(llama_folder, "int8")
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(AdapeftError, match=f"model.name = .* is quantized, which {said}"):
        load(asked.model_copy(update={"quantization": None}), TEXT)


def test_8_bit_layers_do_not_log_every_pass(llama_folder, caplog):
    model = Model(name=str(llama_folder), task="causal-lm", quantization="int8", dtype="bfloat16")
    _, loaded = load(model, TEXT)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        loaded(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    assert not caplog.records


def test_a_stand_in_computes_gradients_of_the_right_shapes(kind):
    settings = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind != "int8", bnb_4bit_quant_type="nf4")
    layer = StandIn.of(nn.Linear(6, 4, device="meta"), settings)
    x = torch.empty(2, 3, 6, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape, layer.bias.grad.shape) == ((2, 3, 4), (2, 3, 6), (4,))
    assert layer.weight.grad is None


def test_the_structure_of_a_dense_model_has_no_stand_ins():
    model = make_bert()
    assert not any(isinstance(module, StandIn) for module in build_structure(model.config, "causal-lm").modules())

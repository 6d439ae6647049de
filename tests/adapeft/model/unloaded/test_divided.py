"""Divided loading gives the model of ``load_model``, one tensor at a time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from adapeft.model.load import load_model, load_model_config, load_tokenizer
from adapeft.model.quantized import quantized_weights
from adapeft.model.section import Model
from adapeft.model.unloaded import divided
from adapeft.model.unloaded.divided import load_divided
from adapeft.model.unloaded.unloaded import NeedsLoadingError, OnlyWholeError, open_unloaded
from tests.adapeft.model.test_load import AUTO, CLASSES, TEXT, save_tokenizer
from tests.support.tiny import VOCABULARY, make_bert, make_gpt2, make_mixtral


class Recorded:
    """A division that keeps the values of every parameter and leaves none in the model."""

    def __init__(self, *, reads: bool) -> None:
        self.reads = reads
        self.values: list[torch.Tensor] = []
        self._parameters: list[nn.Parameter] = []

    def divide(self, parameter: nn.Parameter) -> None:
        assert not any(other is parameter for other in self._parameters)
        self._parameters.append(parameter)
        self.values.append(parameter.detach().clone())
        parameter.data = torch.empty(0)

    def put_back(self) -> None:
        for parameter, value in zip(self._parameters, self.values, strict=True):
            parameter.data = value


def make_qwen() -> Qwen3MoeForCausalLM:
    """A tied mixture of so many experts that the order of their names is not that of their numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 11, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes, **experts))


CASES = {
    "a new head": (lambda: make_bert().bert, "sequence-classification"),
    "a tied head": (make_gpt2, "causal-lm"),
    "a new head of another model": (make_gpt2, "sequence-classification"),
    "fused experts": (make_mixtral, "causal-lm"),
    "many fused experts and a tied head": (make_qwen, "causal-lm"),
    "fused experts and a new head": (make_qwen, "sequence-classification"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_load_model(tmp_path, monkeypatch, case, dtype):
    monkeypatch.setattr(divided, "load_model", None)  # only what cannot be divided is loaded whole
    make, task = CASES[case]
    make().save_pretrained(tmp_path, max_shard_size="20KB")
    check(tmp_path, task, dtype)


@pytest.mark.parametrize("case", CASES)
def test_pickled_weights_are_read_one_tensor_at_a_time(tmp_path, monkeypatch, case):
    make, task = CASES[case]
    make().save_pretrained(tmp_path, max_shard_size="20KB")
    pickle(tmp_path)
    monkeypatch.setattr(divided, "load_model", None)
    check(tmp_path, task, "bfloat16")


def test_what_torch_before_1_6_has_pickled_is_loaded_whole(tmp_path):
    make_bert().bert.save_pretrained(tmp_path)
    pickle(tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(OnlyWholeError, match=r"torch before 1\.6 has pickled its weights"):
        open_unloaded(*opened(tmp_path, "sequence-classification", "float32"), AUTO)
    check(tmp_path, "sequence-classification", "float32")


def test_a_pickled_file_of_something_else_fails_as_in_load_model(tmp_path):
    make_bert().bert.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": 3}, tmp_path / "pytorch_model.bin")
    section, config = opened(tmp_path, "sequence-classification", "float32")
    with pytest.raises(NeedsLoadingError, match="is a int, not a tensor"):
        open_unloaded(section, config, AUTO)
    with pytest.raises(TypeError):
        load_divided(section, config, 3, AUTO, Recorded(reads=True))


def test_a_stored_head_with_other_values_than_the_embedding_is_not_tied(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}, file, {"format": "pt"})
    check(tmp_path, "causal-lm", "float32")


@pytest.mark.parametrize("case", ["a new head of another model", "fused experts"])
def test_parameters_that_transformers_keeps_in_float32_are_cast(tmp_path, monkeypatch, case):
    """An engine in bfloat16 refuses divided parameters of other dtypes, and casts whole ones."""
    make, task = CASES[case]
    model = make()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "_keep_in_fp32_modules_strict", ["ln_1", "layernorm"])
    section, config = opened(tmp_path, task, "bfloat16")
    whole = load_model(section, config, 3, AUTO)
    assert any(parameter.dtype == torch.float32 for parameter in whole.parameters())
    division = Recorded(reads=True)
    load_divided(section, config, 3, AUTO, division)
    assert {values.dtype for values in division.values} == {torch.bfloat16}


def test_a_quantized_base_is_not_divided(tmp_path):
    make_bert().save_pretrained(tmp_path)
    section, config = opened(tmp_path, "sequence-classification", "float32", quantization="nf4")
    division = Recorded(reads=True)
    loaded = load_divided(section, config, 3, AUTO, division)
    assert quantized_weights(loaded) == quantized_weights(load_model(section, config, 3, AUTO)) != {}
    assert not division.values


def opened(folder, task, dtype, **options):
    """Return the section ``model`` and the config of a saved model."""
    save_tokenizer(folder, pad_token="t0", eos_token="<end>")
    section = Model(name=str(folder), task=task, dtype=dtype, **options)
    return section, load_model_config(section, TEXT if task == "causal-lm" else CLASSES, load_tokenizer(section))


def pickle(folder, **options):
    """Replace the weights by pickled ones, whose matrices are transposed views."""
    files = sorted(folder.glob("*.safetensors"))
    weight_map = {}
    for number, file in enumerate(files):
        tensors = {key: value.mT.contiguous().mT if value.ndim > 1 else value for key, value in load_file(file).items()}
        name = "pytorch_model.bin" if len(files) == 1 else f"pytorch_model-{number + 1:05d}-of-{len(files):05d}.bin"
        weight_map.update(dict.fromkeys(tensors, name))
        torch.save(tensors, folder / name, **options)
        file.unlink()
    if len(files) > 1:
        (folder / "model.safetensors.index.json").unlink()
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def check(folder, task, dtype):
    model, config = opened(folder, task, dtype)
    expected = load_model(model, config, 3, AUTO)
    division = Recorded(reads=True)
    loaded = load_divided(model, config, 3, AUTO, division)
    assert all(parameter.numel() == 0 for parameter in loaded.parameters())
    division.put_back()

    for of in (nn.Module.named_parameters, nn.Module.named_buffers):
        found, wanted = dict(of(loaded)), dict(of(expected))
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    assert loaded.config.to_dict() == expected.config.to_dict()
    assert loaded.name_or_path == expected.name_or_path
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert loaded.adapeft_missing == expected.adapeft_missing

    other = Recorded(reads=False)
    load_divided(model, config, 3, AUTO, other)
    assert [(v.shape, v.dtype) for v in other.values] == [(v.shape, v.dtype) for v in division.values]

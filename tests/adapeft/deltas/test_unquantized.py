"""A delta of a quantized base is merged into its unquantized checkpoint on request, and into no other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adapeft import AdapeftError, Delta, attach, delta, merge, sum_of
from adapeft.model.load import label_options, load_model, load_model_config, load_tokenizer
from adapeft.model.section import Model
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.adapeft.model.test_load import TEXT, bert_folder, gpt2_folder
from tests.adapeft.model.test_quantization import base, kind, llama_folder
from tests.oracles.leaves import logits, train

__all__ = ["base", "bert_folder", "gpt2_folder", "kind", "llama_folder"]

MATRICES = {
    "sequence-classification": [
        f"bert.encoder.layer.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("intermediate.dense", "output.dense")
    ],
    "gpt2": [f"transformer.h.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn.c_attn", "mlp.c_proj")],
    "llama": [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (0, 1) for name in ("up", "down")],
}


def trained(task, folder, description, kind) -> Delta:
    """Return the delta of a row, an element and a LoRA part in matrices, an element of a vector, and the head."""
    section = Model(name=str(folder), task=task, quantization=kind)
    model = load_model(section, load_model_config(section, description, load_tokenizer(section)), 0, ("auto",))
    names = MATRICES.get(task) or MATRICES[model.config.model_type]
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    parts = {
        names[0]: Rows(shapes[0], torch.tensor([1, 5, 11]), 0),
        names[1]: Elements(shapes[1], torch.tensor([3, 17, 100])),
        names[2]: Lora(shapes[2], 0, 2, 4.0),
        names[3]: Rows(shapes[3], torch.tensor([0, 7]), 1),
    }
    norm = next(name for name, value in model.named_parameters() if "norm" in name.lower() or "ln_" in name)
    parts[norm] = Elements(tuple(model.get_parameter(norm).shape), torch.tensor([2]))
    new = ("classifier.weight", "classifier.bias") if task == "sequence-classification" else ()
    train(attach(model, Subset(parts, new, new)))
    description = {"name": str(folder), "task": task, "labels": label_options(task, description)}
    return delta(model, {"model": json.loads(json.dumps(description)) | {"quantization": kind}})


def test_the_merged_weights_are_those_of_the_checkpoint_plus_the_delta(base, kind, tmp_path):
    task, folder, description = base
    found = trained(task, folder, description, kind)
    found.save(tmp_path / "delta")
    found = Delta.load(tmp_path / "delta")
    assert found.quantization == kind
    merge(found, str(folder), tmp_path / "merged", unquantized=True)
    section = Model(name=str(folder), task=task)
    before, merged = (
        load_model(one, load_model_config(one, description, load_tokenizer(section)), 0, ("auto",))
        for one in (section, section.model_copy(update={"name": str(tmp_path / "merged")}))
    )
    after = dict(merged.named_parameters())
    for name, parameter in before.named_parameters():
        change = found.changes.get(name)
        if name in found.new:
            assert torch.equal(after[name], found.new[name])
        elif change is None:
            assert torch.equal(after[name], parameter)
        else:
            dense = torch.zeros(change.part.shape)
            change.add_to(name, dense)
            is_conv1d = isinstance(merged.get_submodule(name.rpartition(".")[0]), Conv1D) and dense.ndim == 2
            assert torch.equal(after[name], parameter + (dense.t() if is_conv1d else dense))
            assert not torch.equal(after[name], parameter)
    assert json.loads((tmp_path / "merged" / "adapeft_merge.json").read_text())["trained_on"] == kind
    assert not (tmp_path / "merged" / "config.json").read_text().count("quantization")
    assert logits(merged).isfinite().all()


def test_layers_that_were_not_quantized_and_sums_of_deltas(gpt2_folder, tmp_path):
    """A sum of two kinds of parts covers a matrix whole; a Conv1D that was left out keeps its layout."""
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "c_proj"])
    quantized, square = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"
    found = {}
    for name, part in {"rows": Rows((36, 12), torch.tensor([3, 30]), 0), "lora": Lora((36, 12), 0, 2, 4.0)}.items():
        model = GPT2LMHeadModel.from_pretrained(
            gpt2_folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )
        train(attach(model, Subset({quantized: part, square: Rows((12, 12), torch.tensor([1, 7]), 1)})))
        found[name] = delta(model, {"model": {"task": "causal-lm", "quantization": "fp4"}})
    total = sum_of(found, [1.0, 0.5])
    assert isinstance(total.changes[quantized].part, Whole)
    before = load_file(gpt2_folder / "model.safetensors")
    for number, one in enumerate([*found.values(), total]):
        merge(one, str(gpt2_folder), tmp_path / str(number), unquantized=True)
        after = load_file(tmp_path / str(number) / "model.safetensors")
        for name, is_turned in ((quantized, True), (square, False)):
            dense = torch.zeros(one.changes[name].part.shape)
            one.changes[name].add_to(name, dense)
            assert dense.count_nonzero() > 0
            assert torch.equal(after[name], before[name] + (dense.t() if is_turned else dense))


def test_what_is_refused(llama_folder, tmp_path):
    found = trained("causal-lm", llama_folder, TEXT, "nf4")
    with pytest.raises(AdapeftError, match=r"belongs to a base quantized to nf4.* by --unquantized \(in Python"):
        merge(found, str(llama_folder), tmp_path / "merged")
    other = tmp_path / "other"
    shutil.copytree(llama_folder, other)
    tensors = load_file(other / "model.safetensors")
    for name, said in (("model.norm.weight", "They differ in 'norm.weight'"), ("model.embed_tokens.weight", "'embed_")):
        save_file({**tensors, name: tensors[name] + 1}, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(AdapeftError, match=f"is not the checkpoint of the quantized base .*{said}"):
            merge(found, str(other), tmp_path / "merged", unquantized=True)
    with pytest.raises(AdapeftError, match=r"is not the checkpoint of the quantized base .*lacks"):
        merge(replace(found, digests=found.digests[1:]), str(llama_folder), tmp_path / "merged", unquantized=True)
    with pytest.raises(AdapeftError, match="the delta has no digests"):
        merge(replace(found, digests=None), str(llama_folder), tmp_path / "merged", unquantized=True)
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    quantized = LlamaForCausalLM.from_pretrained(llama_folder, quantization_config=settings, device_map="cpu")
    quantized.save_pretrained(tmp_path / "quantized")
    with pytest.raises(AdapeftError, match=r"is itself quantized \(int8\)"):
        merge(found, str(tmp_path / "quantized"), tmp_path / "merged", unquantized=True)
    plain = LlamaForCausalLM.from_pretrained(llama_folder)
    attach(plain, Subset({"model.norm.weight": Elements((24,), torch.tensor([2]))}))
    with pytest.raises(AdapeftError, match="the delta was not trained on a quantized base"):
        merge(delta(plain), str(llama_folder), tmp_path / "merged", unquantized=True)
    assert not (tmp_path / "merged").exists()

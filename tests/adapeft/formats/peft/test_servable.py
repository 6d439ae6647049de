"""Adapters for vLLM and SGLang: what their loaders read is exact, and what they cannot load is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from adapeft import AdapeftError
from adapeft.formats.peft.folder import save_for_peft
from adapeft.formats.peft.parts import PREFIX
from adapeft.formats.peft.servable import check_rank
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.servers import MAX_RANK, rank_to_serve
from tests.oracles.leaves import logits
from tests.oracles.merged import random_delta, save_base, summed
from tests.oracles.parts import make_llama
from tests.support.tiny import make_gpt2

KEY = "model.layers.0.self_attn.k_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
PARTS = {KEY: Rows((6, 12), torch.tensor([1])), UP: Lora((19, 12), 0, 2, 3.0), DOWN: Rows((12, 19), torch.arange(7))}


def exported(make, parts, folder):
    delta = random_delta(make(), parts)
    return delta, save_for_peft(delta, save_base(make(), folder / "base"), folder / "out", servable=True)


def test_r_alpha_and_tensors_alone_give_the_outputs(tmp_path):
    """A loader that scales by lora_alpha / r and reads A and B, as both do, has the weights of base + delta."""
    delta, (folder,) = exported(make_llama, PARTS, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 7, 7, "none")
    assert isinstance(config["target_modules"], list)
    refused = ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "trainable_token_indices")
    assert not [key for key in refused if config.get(key)]
    layers = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    attention, mlp = "model.layers.0.self_attn", "model.layers.1.mlp"
    stacks = {f"{attention}.{name}_proj" for name in "qkv"} | {f"{mlp}.{name}_proj" for name in ("gate", "up", "down")}
    assert layers == stacks  # SGLang stacks q, k, v and gate, up: the others are there as zeros
    model = make_llama()
    for layer in layers:
        a, b = (tensors[f"{PREFIX}{layer}.lora_{x}.weight"] for x in "AB")
        assert (len(a), b.shape[1]) == (7, 7)
        model.get_submodule(layer).weight.data += b @ a
    expected = logits(summed(make_llama(), delta))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    loaded = PeftModel.from_pretrained(make_llama(), folder)
    torch.testing.assert_close(logits(loaded.base_model.model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "name", "part", "message"),
    [
        (make_llama, KEY, Elements((6, 12), torch.tensor([3])), "changes single elements"),
        (make_llama, "model.embed_tokens.weight", Rows((40, 12), torch.tensor([3])), "changes rows of an embedding"),
        (make_llama, "model.norm.weight", Whole((12,)), "changes a tensor saved whole"),
        (
            make_llama,
            "lm_head.weight",
            Rows((40, 12), torch.tensor([3])),
            "both load LoRA only on layers called q_proj",
        ),
        (make_gpt2, "transformer.h.0.mlp.c_fc.weight", Lora((12, 24), 0, 1, 1.0), "only on layers called"),
        (make_gpt2, "transformer.h.0.mlp.c_fc.bias", Whole((24,)), "changes a bias"),
    ],
)
def test_what_they_could_not_load_is_refused_by_name(make, name, part, message, tmp_path):
    shape = tuple(make().get_parameter(name).shape)
    part = Lora(shape, 1, 1, 1.0) if isinstance(part, Lora) else replace(part, shape=shape)
    with pytest.raises(AdapeftError, match=message) as refused:
        exported(make, {name: part}, tmp_path)
    assert name in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_ranks():
    check_rank(KEY, MAX_RANK)
    with pytest.raises(AdapeftError, match=f"{KEY}' has rank 257"):
        check_rank(KEY, MAX_RANK + 1)
    assert [rank_to_serve(rank) for rank in (1, 8, 9, 256)] == [8, 8, 16, 256]

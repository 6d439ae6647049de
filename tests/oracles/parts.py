"""Tiny models with LoRA, adapters and other parts, and the float64 product of LoRA's matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adapeft.model.structure import describe_parameters, new_parameters
from adapeft.parts.adapter import Adapter
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from tests.support.tiny import VOCABULARY, make_bert, make_gpt2


def make_llama(num_layers: int = 2) -> LlamaForCausalLM:
    """Layers with grouped-query attention: keys and values are half as wide as queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=19,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config)
    model.config.architectures = ["LlamaForCausalLM"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


MODELS = {"bert": make_bert, "gpt2": make_gpt2, "llama": make_llama}


def mixed_subset(model: torch.nn.Module, adapters: bool = True) -> Subset:
    """Return a subset with LoRA of several ranks, rows, elements, whole LayerNorms, a new head, and adapters.

    The adapters follow the outputs of the last block, some of which also have LoRA.
    """
    parts: dict[str, Part] = {}
    always = new_parameters(model)
    for position, info in enumerate(describe_parameters(model)):
        if info.name in always:
            continue
        if adapters and info.output_of and info.layer == 1:
            parts[info.name.removesuffix(".weight")] = Adapter((info.shape[info.output_dim],), 2)
        if len(info.shape) == 1:
            if "norm" in info.name.lower() or "ln_" in info.name:
                parts[info.name] = Whole(info.shape)
        elif info.is_linear and info.layer >= 0 and position % 3:
            rank = 1 + position % 4
            parts[info.name] = Lora(info.shape, info.output_dim or 0, rank, 3.0)
        elif position % 2:
            parts[info.name] = Rows(info.shape, torch.tensor([1, 4]), info.output_dim or 0)
        else:
            parts[info.name] = Elements(info.shape, torch.arange(0, info.count, 9))
    return Subset(parts, always, always, Choice(seed=5))


def low_rank_product(part: Part, values: Tensor) -> Tensor:
    """Return the change of the parameter by LoRA's values, float64, by a loop over its ranks."""
    inputs, outputs = part.shape[1 - part.dim], part.shape[part.dim]
    a = values[: part.rank * inputs].double().reshape(part.rank, inputs)
    b = values[part.rank * inputs :].double().reshape(outputs, part.rank)
    total = torch.zeros(outputs, inputs, dtype=torch.float64)
    for index in range(part.rank):
        total += torch.outer(b[:, index], a[index]) * part.alpha / part.rank
    return total if part.dim == 0 else total.T

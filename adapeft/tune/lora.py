"""LoRA leaves: peft's layers around linear layers, with a start that every rank and every run draws alike."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
from torch import nn

from adapeft.choose.subset import Part

_ADAPTER = "adapeft"


def inject_lora(model: nn.Module, parts: Mapping[str, Part], seed: int) -> dict[str, dict[str, nn.Parameter]]:
    """Puts peft's LoRA layers around the linear layers whose weights ``parts`` names, in place.

    B starts at zero, so the model's output is the base's, bit for bit; A is drawn as in peft, but by name and seed.
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

    Returns:
        Weight's name → its leaves ``lora_A`` [rank, in] and ``lora_B`` [out, rank], float32."""
    from peft import LoraConfig, inject_adapter_in_model  # a second of importing, which most subsets need not wait for

    modules = {name: name.removesuffix(".weight") for name in parts}
    config = LoraConfig(
        target_modules="|".join(f"(?:{re.escape(module)})" for module in modules.values()),
        rank_pattern={f"^{re.escape(modules[name])}": part.rank for name, part in parts.items()},
        alpha_pattern={f"^{re.escape(modules[name])}": part.alpha for name, part in parts.items()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Conv1D stores its weight transposed, which peft then sees to itself
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    leaves = {}
    for name, part in parts.items():
        layer: Any = model.get_submodule(modules[name])
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        down.data = _start(name, part, seed).to(down.device)
        up.data = torch.zeros(up.shape, dtype=torch.float32, device=up.device)
        leaves[name] = {"lora_A": down, "lora_B": up}
    return leaves


def remove_lora(model: nn.Module) -> None:
    """Gives every linear layer its place back."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer) and _ADAPTER in layer.lora_A:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    del model.peft_config


def _start(name: str, part: Part, seed: int) -> torch.Tensor:
    """Uniform within ±1/√in, which is peft's ``kaiming_uniform_(a=√5)``."""
    rows, inputs = part.factor_shapes["lora_A"]
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
    return (2 * torch.rand(rows, inputs, generator=generator) - 1) / math.sqrt(inputs)

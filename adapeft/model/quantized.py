"""Linear layers whose weights bitsandbytes has quantized: nothing can read or change single elements of them.

bitsandbytes is not imported here: a model with such layers has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from adapeft.errors import AdapeftError
from adapeft.model.stand_in import StandIn

_HAS_ADAPTERS = "_hf_peft_config_loaded"
"""Attribute by which transformers knows of trainable parts in a model; with gradient checkpointing it then lets the
inputs of frozen layers require gradients."""


def is_quantized_layer(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` is a linear layer of bitsandbytes, or stands in for one without weights."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and issubclass(cls, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
        return True
    return issubclass(cls, StandIn)


def quantization_of(module: nn.Module) -> str:
    """Return the type of a linear layer's quantized weight, ``int8``, ``nf4`` or ``fp4``; empty if it has none."""
    if not is_quantized_layer(type(module)):
        return ""
    if isinstance(module, StandIn):
        return module.quantization
    weight: Any = module._parameters["weight"]
    state: Any = getattr(module, "state", None)
    if state is not None:  # of 8 bits
        return "" if state.has_fp16_weights else "int8"
    return str(weight.quant_type) if getattr(weight, "quant_state", None) is not None else ""


def quantized_weights(model: nn.Module) -> dict[str, str]:
    """Return name → type of every weight that bitsandbytes has quantized."""
    found = {f"{path}.weight".lstrip("."): quantization_of(module) for path, module in model.named_modules()}
    return {name: quantization for name, quantization in found.items() if quantization}


def describe_quantization(model: nn.Module) -> dict[str, str]:
    """Return the entry ``quantization`` of a model's description, the type of its quantized weights; none if dense."""
    types = sorted(set(quantized_weights(model).values()))
    return {"quantization": ", ".join(types)} if types else {}


def check_not_whole(call: str, names: Collection[str], quantized: Mapping[str, str]) -> None:
    """Check that none of the ``names`` of parameters that are trained whole is ``quantized``.

    Raises:
        AdapeftError: one is.
    """
    whole = [name for name in names if name in quantized]
    if whole:
        raise AdapeftError(
            f"adapeft.{call}: {len(whole)} matrices such as {whole[0]!r} are quantized ({quantized[whole[0]]}) and "
            f"cannot be trained whole. Train rows, elements or LoRA of them, leave them out with select.exclude, or "
            f"load them without quantization (llm_int8_skip_modules of BitsAndBytesConfig, such as a new head)."
        )


def keep_codes_in_place(model: nn.Module) -> list[nn.Module]:
    """Keep 4-bit layers from repacking their weights, and return the layers that would have.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 repacks a weight in the first forward pass in evaluation mode whose
    input needs no gradient, and from then on computes with a kernel that has no backward pass: gradients would end at
    the layer without an error.
    """
    changed = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in changed:
        module.state_dict()  # undoes the repacking, in place
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return changed


def let_codes_be_repacked(layers: Collection[nn.Module]) -> None:
    """Undo ``keep_codes_in_place``, which returned ``layers``."""
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


def admit_to_trainer(model: nn.Module) -> None:
    """Let the Trainer of transformers train a quantized model, which it otherwise refuses without PEFT's adapters."""
    if quantized_weights(model):
        model.__dict__[_HAS_ADAPTERS] = True


def undo_admission(model: nn.Module) -> None:
    """Undo ``admit_to_trainer``."""
    model.__dict__.pop(_HAS_ADAPTERS, None)

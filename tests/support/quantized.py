"""Tiny models whose linear layers bitsandbytes has quantized, and their dense counterparts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from adapeft.model.quantized import keep_codes_in_place

TYPES = ("int8", "nf4")


def load_quantized(
    make: Callable[[], PreTrainedModel], quantization: str, folder: Path, *, repacks: bool = False
) -> PreTrainedModel:
    """Load the model that ``make`` returns as transformers loads a quantized one.

    Args:
        repacks: whether 4-bit layers may repack their weights on CPUs that support it, which rounds to bfloat16 and
            fails on widths that are no multiple of 32.
    """
    plain = make()
    architectures = plain.config.architectures  # which save_pretrained sets
    plain.save_pretrained(folder)
    options = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    options["llm_int8_skip_modules"] = ["classifier", "lm_head"]
    found = type(plain).from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map="cpu"
    )
    found.config.architectures = architectures
    if not repacks:
        keep_codes_in_place(found)
    return found.eval()


def dequantized(layer: nn.Module) -> Tensor:
    """Return the weight [out, in] that a quantized layer computes with on a CPU."""
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def scale_bytes(model: nn.Module) -> int:
    """Return the bytes of the scales of all quantized weights, without bitsandbytes' tables of a fixed size."""
    total = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            total += (module.weight.SCB if module.weight.SCB is not None else module.state.SCB).nbytes
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module._parameters["weight"].quant_state
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def as_dense(model: PreTrainedModel, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Return the model of ``make`` with the dequantized weights of ``model``, and its other values."""
    dense = make()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            layer = model.get_submodule(name.rpartition(".")[0])
            is_packed = not own[name].is_floating_point()
            parameter.copy_(dequantized(layer) if is_packed else own[name])
    return dense.eval()


def make_wide() -> BertForSequenceClassification:
    """A model of which bitsandbytes can repack the weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=29, num_labels=3, **sizes))
    model.config.architectures = ["BertModel"]
    return model

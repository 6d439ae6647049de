"""Quantization of a base by bitsandbytes while transformers loads it: ``model.quantization``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils import is_bitsandbytes_available

from adapeft.errors import AdapeftError
from adapeft.model.stand_in import StandIn
from adapeft.model.structure import always_trained
from adapeft.tasks.registry import TASKS

if TYPE_CHECKING:
    from adapeft.model.section import Model

_TYPES = ("int8", "nf4", "fp4")
"""Types of bitsandbytes."""


def stored_quantization(config: PretrainedConfig) -> str:
    """Return how the weights of a checkpoint are quantized, such as ``nf4``, or the library; empty if they are not."""
    stored: Any = getattr(config, "quantization_config", None)
    if not stored:
        return ""
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    method = settings.get("quant_method", "an unknown type")
    return str(getattr(method, "value", method))


def check_quantization(model: Model, config: PretrainedConfig) -> None:
    """Check that the checkpoint can be loaded as ``model.quantization`` says.

    Args:
        model: the config's ``model`` section.
        config: config of the checkpoint.

    Raises:
        AdapeftError: the checkpoint is already quantized, otherwise than that; or bitsandbytes is missing.
    """
    stored = stored_quantization(config)
    if stored and model.quantization not in (None, stored):
        raise AdapeftError(
            f"model.quantization = {model.quantization}: the checkpoint {model.name!r} is already quantized "
            f"({stored}), and is loaded as it is. Leave model.quantization out, or give a checkpoint that is not "
            f"quantized."
        )
    if (stored or model.quantization) in _TYPES and not is_bitsandbytes_available():
        given = f"model.name = {model.name!r} is quantized" if stored else f"model.quantization = {model.quantization}"
        raise AdapeftError(
            f"{given}, which needs bitsandbytes, and it is missing or too old: pip install 'adapeft[quantization]', "
            f"here and on the workers."
        )


def quantization_settings(model: Model, structure: PreTrainedModel, always_train: Sequence[str]) -> BitsAndBytesConfig:
    """Return how transformers shall quantize an unquantized checkpoint to ``model.quantization``, int8 or nf4.

    nf4 is that of QLoRA (Dettmers et al. 2023): 4-bit codes in blocks of 64 with scales that are quantized to 8 bits
    themselves, computed in ``model.dtype``. Embeddings, norms, tied weights and the output embeddings stay as they are,
    as transformers decides; so do a head and everything else that is always trained, which is trained whole.

    Args:
        model: the config's ``model`` section.
        structure: model on the meta device, with dense layers.
        always_train: patterns of ``select.always_train``.
    """
    skipped = HfQuantizer.get_modules_to_not_convert(structure)
    skipped += sorted({name.rpartition(".")[0] for name in always_trained(structure, always_train)})
    if TASKS[model.task].has_head:
        children = structure.named_children()
        skipped += [name for name, _ in children if name != structure.base_model_prefix]
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        llm_int8_skip_modules=skipped,
    )


def put_stand_ins(structure: PreTrainedModel) -> None:
    """Replace the layers of a model on the meta device that its config's quantization by bitsandbytes replaces.

    Other quantizations are left out: their layers stay dense.
    """
    stored: Any = getattr(structure.config, "quantization_config", None)
    if stored_quantization(structure.config) not in _TYPES:
        return
    settings = BitsAndBytesConfig.from_dict(stored) if isinstance(stored, dict) else stored
    from transformers.integrations import replace_with_bnb_linear  # imports bitsandbytes

    in_float32 = structure._keep_in_fp32_modules
    skipped = HfQuantizer.get_modules_to_not_convert(
        structure, settings.llm_int8_skip_modules, None if in_float32 is None else list(in_float32)
    )
    before = dict(structure.named_modules())
    replace_with_bnb_linear(structure, skipped, settings)
    for path, layer in list(structure.named_modules()):
        if layer is not before[path]:
            structure.set_submodule(path, StandIn.of(layer, settings))


def silence_casts() -> None:
    """Silence bitsandbytes' warning about casts, which every 8-bit layer logs in every forward pass."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

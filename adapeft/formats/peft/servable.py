"""What the LoRA loaders of vLLM and SGLang accept, in one place: the adapters that both serve with the right outputs.

Sources, read in 2026: vLLM's ``lora/peft_helper.py`` (``PEFTHelper``), ``config/lora.py`` (``MaxLoRARanks``) and
``lora/utils.py``; SGLang's ``srt/lora/lora_config.py``, ``lora.py`` and ``utils.py``. In short:

- One adapter of type LoRA, without ``modules_to_save``, biases or DoRA, which vLLM refuses.
- r of at most ``MAX_RANK``. Both scale by ``lora_alpha / r`` and do not use ``rank_pattern`` and ``alpha_pattern``:
  vLLM ignores them, SGLang allocates by r. So all matrices are padded to one rank.
- ``target_modules`` is a list: SGLang does not interpret a pattern.
- The linear layers in ``LAYERS``. vLLM serves LoRA on every linear layer of a model, SGLang on those whose sizes it
  knows (``get_hidden_dim``). Rows of embeddings and the output embeddings depend on their versions and are left out.
- SGLang stacks the layers of ``STACKED`` and assumes that all of one stack have LoRA (``normalize_qkv_proj`` looks
  up the values when it finds the queries, ``normalize_gate_up_proj`` starts from the gate): missing ones get zeros.

Both convert the tensors to the served model's dtype.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.formats.peft.parts import PeftParts, owner_of
from adapeft.parts.change import Change
from adapeft.parts.lora import Lora

MAX_RANK = 256
"""Largest rank that all versions of vLLM accept; newer ones also accept 320 and 512."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256)
"""Values of vLLM's ``max_lora_rank`` in all versions."""

STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that both servers compute as one matrix."""

LAYERS = (*STACKED[0], "o_proj", *STACKED[1], "down_proj")
"""Last names of the linear layers whose LoRA both serve."""

_REMEDY = "Serve the merged checkpoint (adapeft merge)."


def is_servable(name: str) -> bool:
    """Return whether both serve LoRA on the weight called ``name``, by the name of its layer."""
    layer, _, local = name.rpartition(".")
    return local == "weight" and layer.rpartition(".")[2] in LAYERS


def make_servable(parts: PeftParts, structure: nn.Module) -> None:
    """Check that ``parts`` can be served, and add LoRA of zeros to the other layers of each stack.

    Args:
        parts: changes of a delta by their form in PEFT.
        structure: model of the base.

    Raises:
        AdapeftError: a change cannot be served. Names the parameter.
    """
    biases = [f"{path}.bias" for path in parts.biases]
    for what, names in (
        ("single elements", list(parts.elements)),
        ("rows of an embedding", [f"{path}.weight" for path in parts.tokens]),
        ("a bias", biases),
        ("a tensor saved whole", [name for name in parts.whole if name not in biases]),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise AdapeftError(
                f"the delta changes {what}, {names[0]!r}{others}: the LoRA loaders of vLLM and SGLang hold only LoRA "
                f"and rows of linear layers. {_REMEDY}"
            )
    if not parts.lora:
        raise AdapeftError("the delta changes nothing, so there is no LoRA to serve.")
    for name, change in parts.lora.items():
        if not is_servable(name):
            raise AdapeftError(
                f"the delta changes {name!r}: vLLM and SGLang both load LoRA only on layers called "
                f"{', '.join(LAYERS)}. {_REMEDY}"
            )
        check_rank(name, change.part.rank)
    _complete_stacks(parts, structure)


def check_rank(name: str, rank: int) -> None:
    """Check the rank of the LoRA on the weight called ``name``; k rows have rank k.

    Raises:
        AdapeftError: vLLM does not accept it.
    """
    if rank > MAX_RANK:
        raise AdapeftError(
            f"{name!r} has rank {rank} as LoRA (one per changed row): vLLM loads at most {MAX_RANK}. Lower "
            f"select.budget, or serve the merged checkpoint (adapeft merge)."
        )


def check_targets(config: LoraConfig) -> None:
    """Check the names of the layers.

    Raises:
        AdapeftError: only a pattern names them, because the paths of other layers end like theirs.
    """
    if isinstance(config.target_modules, str):
        raise AdapeftError(
            f"PEFT can name the layers of this model only by a pattern ({config.target_modules[:60]}…), because the "
            f"paths of other layers end alike; SGLang does not interpret it. Serve the merged checkpoint "
            f"(adapeft merge)."
        )


def rank_to_serve(rank: int) -> int:
    """Return the smallest ``max_lora_rank`` with which vLLM loads an adapter of ``rank``."""
    return next(most for most in VLLM_RANKS if most >= rank)


def _complete_stacks(parts: PeftParts, structure: nn.Module) -> None:
    weights = dict(structure.named_parameters())
    for name in list(parts.lora):
        parent, _, own = owner_of(name).rpartition(".")
        for sibling in next((stack for stack in STACKED if own in stack), ()):
            other = f"{parent}.{sibling}.weight"
            if other in weights and other not in parts.lora:
                part = Lora(tuple(weights[other].shape), 0, 1, 1.0)
                parts.lora[other] = Change(part, torch.zeros(part.count))
                parts.layers.add(owner_of(other))

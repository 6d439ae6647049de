"""Changes of a delta that the LoRA loaders of vLLM and SGLang accept, so that both serve base + delta.

What they accept is in ``adapeft/servers.py``.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.formats.peft.parts import PeftParts, owner_of
from adapeft.parts.change import Change
from adapeft.parts.lora import Lora
from adapeft.servers import LAYERS, MAX_RANK, STACKED, is_servable

_REMEDY = (
    "Choose with select.servable: true, which leaves everything else out, or serve the merged checkpoint (adapeft "
    "merge)."
)


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
            f"{name!r} has rank {rank} as LoRA (one per changed row): vLLM loads at most {MAX_RANK}. {_REMEDY}"
        )


def check_targets(config: LoraConfig) -> None:
    """Check the names of the layers.

    Raises:
        AdapeftError: only a pattern names them, because the paths of other layers end like theirs.
    """
    if isinstance(config.target_modules, str):
        raise AdapeftError(
            f"PEFT can name the layers of this model only by a pattern ({config.target_modules[:60]}…), because the "
            f"paths of other layers end alike; SGLang does not interpret it. {_REMEDY}"
        )


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

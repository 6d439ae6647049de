"""LoRA of a delta in the form that every loader of LoRA reads alike."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from adapeft.parts.change import Change
from adapeft.parts.lora import Lora

_MOST_PADDING = 1.5
"""Elements with every matrix at the largest rank, per element at its own rank, up to which the file is padded."""


def lora_for_peft(
    changes: Mapping[str, Change[Lora]], structure: nn.Module, before: str
) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """PEFT's config, and A [r, in] and B [out, r] of every layer.

    ``r`` is the largest rank, ``lora_alpha`` equals it, and the scaling is in B, so that W + B A · lora_alpha / r is
    right for a loader that knows nothing else. Smaller ranks are padded with zeros up to ``r`` while that makes the
    file at most half as large again; beyond, patterns of equal rank and alpha tell PEFT the size of each matrix, and
    what ignores them has the same factor of 1.

    Args:
        changes: LoRA by the name of its weight.
        structure: the model, for its other modules.
        before: pattern of what may stand before the names.
    """
    ranks = {_layer(name): change.part.rank for name, change in changes.items()}
    widths = {_layer(name): sum(change.part.shape) for name, change in changes.items()}
    r = max(ranks.values())
    own = sum(rank * widths[layer] for layer, rank in ranks.items())
    is_padded = r * sum(widths.values()) <= _MOST_PADDING * own
    factors = {}
    for name, change in changes.items():
        pieces = change.part.split(change.values)
        b = (pieces["lora_B"].double() * (change.part.alpha / change.part.rank)).float()
        fill = r - change.part.rank if is_padded else 0
        factors[_layer(name)] = (F.pad(pieces["lora_A"], (0, 0, 0, fill)), F.pad(b, (0, fill)))
    smaller = {} if is_padded else {layer: rank for layer, rank in ranks.items() if rank < r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=target_modules(ranks, structure, before),
        rank_pattern={f"^{before}{re.escape(layer)}": rank for layer, rank in smaller.items()},
        alpha_pattern={f"^{before}{re.escape(layer)}": rank for layer, rank in smaller.items()},
        fan_in_fan_out=any(change.part.dim == 1 for change in changes.values()),
    )
    return config, factors


def target_modules(layers: Collection[str], structure: nn.Module, before: str) -> list[str] | str:
    """What makes PEFT wrap exactly ``layers``: their last names where no other module has them, else their paths.

    PEFT takes a name for the end of a path. Where another module ends in one of the paths it is a pattern.
    """
    paths = [path for path, _ in structure.named_modules(remove_duplicate=False)]
    others = {_last(path) for path in paths if path not in layers}
    names = sorted({layer if _last(layer) in others else _last(layer) for layer in layers})
    wrapped = {path for path in paths if any(f".{path}".endswith(f".{name}") for name in names)}
    return names if wrapped == set(layers) else "|".join(before + re.escape(layer) for layer in layers)


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _last(path: str) -> str:
    return path.rpartition(".")[2]

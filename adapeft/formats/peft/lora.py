"""LoRA of a delta in a form that all loaders of LoRA interpret in the same way."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from adapeft.parts.change import Change
from adapeft.parts.lora import Lora

_MOST_PADDING = 1.5
"""Limit on elements with all matrices padded to the largest rank, relative to elements without padding."""


def lora_for_peft(
    changes: Mapping[str, Change[Lora]], structure: nn.Module, before: str, *, one_rank: bool = False
) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """Return PEFT's config, and A [r, in] and B [out, r] of every layer.

    ``r`` is the largest rank, ``lora_alpha`` equals it, and the scaling is in B, so that W + B A · lora_alpha / r is
    right for a loader that uses nothing else. Smaller ranks are padded with zeros to ``r`` if that makes the file at
    most 1.5 times as large. Otherwise ``rank_pattern`` and ``alpha_pattern``, which are equal, give the rank of each
    matrix, and a loader that ignores them has the same factor of 1.

    Args:
        changes: weight → LoRA.
        structure: model, for the names of its other modules.
        before: pattern of a prefix of the names.
        one_rank: whether to pad to ``r`` however large the file becomes.
    """
    ranks = {_layer(name): change.part.rank for name, change in changes.items()}
    widths = {_layer(name): sum(change.part.shape) for name, change in changes.items()}
    r = max(ranks.values())
    own = sum(rank * widths[layer] for layer, rank in ranks.items())
    is_padded = one_rank or r * sum(widths.values()) <= _MOST_PADDING * own
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
    """Return ``target_modules`` with which PEFT wraps exactly ``layers``.

    These are their last names, or their paths if another module has the same last name. PEFT matches a name with the
    end of a path; if another module's path ends with one of these paths, the result is one pattern.
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

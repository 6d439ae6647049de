"""Deltas of given parts with drawn values, and what they amount to in dense float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adapeft import Delta
from adapeft.model.fingerprint import fingerprint_model
from adapeft.parts.change import Change
from adapeft.parts.part import Part
from tests.oracles.leaves import densify
from tests.oracles.parts import low_rank_product


def drawn_delta(model: nn.Module, parts: Mapping[str, Part], seed: int, /, head: bool = False, **description) -> Delta:
    """A delta with normal values; with a head of the model's own shape where one is wanted."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, part in parts.items():
        changes[name] = Change(part, torch.randn(part.value_shape, generator=generator))
    heads = [(name, value) for name, value in model.named_parameters() if name.startswith("classifier")] if head else []
    new = {name: torch.randn(value.shape, generator=generator) for name, value in heads}
    return Delta(changes, new, fingerprint_model(model, new), description)


def dense_of(change: Change) -> Tensor:
    """float64, of the parameter's shape."""
    if change.part.kind == "lora":
        return low_rank_product(change.part, change.values)
    return densify(change.part, change.values.double())

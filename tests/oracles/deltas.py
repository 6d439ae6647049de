"""Deltas of given parts with random values, and their dense float64 values."""

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
    """Return a delta with normal values, with ``head`` also for the model's classifier."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, part in parts.items():
        changes[name] = Change(part, torch.randn(part.value_shape, generator=generator))
    heads = [(name, value) for name, value in model.named_parameters() if name.startswith("classifier")] if head else []
    new = {name: torch.randn(value.shape, generator=generator) for name, value in heads}
    return Delta(changes, new, fingerprint_model(model, new), description)


def dense_of(change: Change) -> Tensor:
    """Return a change as a dense float64 tensor of the parameter's shape."""
    if change.part.kind == "lora":
        return low_rank_product(change.part, change.values)
    return densify(change.part, change.values.double())

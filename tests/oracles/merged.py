"""Deltas with random values on tiny models, and merging in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from adapeft import Delta
from adapeft.model.fingerprint import fingerprint_model
from adapeft.model.structure import new_parameters
from adapeft.parts.change import Change
from adapeft.parts.part import Part
from tests.oracles.leaves import densify
from tests.oracles.parts import low_rank_product

CLASSIFIER = {"name": "base", "task": "sequence-classification", "labels": {"num_labels": 3}}
LANGUAGE = {"name": "base", "task": "causal-lm", "labels": {}}


def random_delta(model: nn.Module, parts: Mapping[str, Part]) -> Delta:
    """Return a delta with values of about 0.2, including the new head if the model has one."""
    generator = torch.Generator().manual_seed(7)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    changes = {}
    for name, part in parts.items():
        changes[name] = Change(part, draw(part.value_shape))
    new = {name: draw(tuple(model.get_parameter(name).shape)) for name in new_parameters(model)}
    described = LANGUAGE if hasattr(model, "lm_head") else CLASSIFIER
    return Delta(changes, new, fingerprint_model(model, new), {"model": described})


@torch.no_grad()
def summed(model: nn.Module, delta: Delta) -> nn.Module:
    """Return ``model`` with base + delta in its weights, computed densely in float64."""
    for name, change in delta.changes.items():
        part, values = change.part, change.values.double()
        dense = low_rank_product(part, values) if part.kind == "lora" else densify(part, values)
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.double() + dense)
    for name, value in delta.new.items():
        model.get_parameter(name).copy_(value)
    return model


def save_base(model: nn.Module, folder: object) -> str:
    """Save the base model, without a new head, as a checkpoint of several shards, and return its path."""
    base = model if not new_parameters(model) else getattr(model, model.base_model_prefix)
    base.save_pretrained(folder, max_shard_size="6KB")
    return str(folder)

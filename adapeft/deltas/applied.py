"""Adding a delta to a model's weights in place, and removing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.model.divided import gathered, is_partitioned
from adapeft.model.quantized import check_not_whole, quantized_weights
from adapeft.model.rounding import Rounding
from adapeft.parts.change import Change
from adapeft.parts.layers.leaves import remove_leaves
from adapeft.parts.part import Part
from adapeft.parts.registry import by_kind


@dataclass
class Applied:
    """A delta that was added to a model's weights, with the base entries that it replaced."""

    model: nn.Module
    _changes: list[tuple[Change, Tensor, Tensor]]
    _whole: list[tuple[Tensor, Tensor]]
    _installed: dict[str, Part]
    _labels: dict[str, Any]

    @torch.no_grad()
    def revert(self) -> None:
        """Remove the delta; the weights are bit-identical to before."""
        for change, parameter, entries in self._changes:
            change.put_back(parameter, entries)
        for place, value in self._whole:
            place.copy_(value)
        for kind, parts in reversed(by_kind(self._installed)):
            kind.remove(self.model, parts)
        if any(part.is_indexed for part in self._installed.values()):
            for module in self.model.modules():
                remove_leaves(module)
        config: Any = getattr(self.model, "config", None)
        for key, value in self._labels.items():
            setattr(config, key, value)
        self._changes, self._whole, self._installed = [], [], {}


@torch.no_grad()
def install(
    model: nn.Module, changes: Mapping[str, Change], whole: Mapping[str, Tensor], names: Sequence[str] | None
) -> Applied:
    """Add ``changes`` to a model whose names, shapes and fingerprint were checked before.

    What is added to parameters that ZeRO-3 has divided cannot be removed again. Collective for such a model.

    Args:
        model: base of the changes.
        changes: differences by name of the parameter, adapters by name of their layer.
        whole: values of parameters and buffers that replace those of the model.
        names: class names for the model's config; None keeps its own.

    Raises:
        AdapeftError: a sum is beyond the range of the parameter's dtype; the model is as before.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    parts = {name: change.part for name, change in changes.items()}
    adapters = {name: part for name, part in parts.items() if not part.changes_parameter}
    behind = adapters | parts_on_quantized(model, parts)
    in_place = {name: change for name, change in changes.items() if name not in behind}
    kept = {name: change for name, change in in_place.items() if not is_partitioned(parameters[name])}
    undo = [(change, parameters[name], change.touched(parameters[name])) for name, change in kept.items()]
    places = {**parameters, **dict(model.named_buffers())}
    replaced = [(places[name], places[name].detach().clone()) for name in whole if not is_partitioned(places[name])]
    try:
        added = (one.add_to(name, *rest) for name, (one, *rest) in zip(kept, undo, strict=True))
        rounding = sum(added, Rounding())
        for name, change in in_place.items():
            if name not in kept:
                with gathered(parameters[name], changes=True):
                    rounding += change.add_to(name, parameters[name])
    except AdapeftError:
        Applied(model, undo, [], {}, {}).revert()
        raise
    rounding.warn("Load the base in float32 to keep them.")
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for kind, own in by_kind(behind):
        kind.prepare(model, own)
        for name, part in own.items():
            part.install(model, name, changes[name].values)
    for parameter, required in required_grad.items():
        parameter.requires_grad_(required)  # PEFT freezes all parameters
    for name, value in whole.items():
        with gathered(places[name], changes=True):
            places[name].copy_(value)
    return Applied(model, undo, replaced, behind, _name_outputs(model, names))


def parts_on_quantized(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Return the parts on quantized weights, which are installed next to them.

    Raises:
        AdapeftError: a part replaces the whole of a quantized weight.
    """
    quantized = quantized_weights(model)
    check_not_whole("Delta.apply", [name for name, part in parts.items() if not part.adds_to_output], quantized)
    return {name: part for name, part in parts.items() if name in quantized}


def _name_outputs(model: nn.Module, names: Sequence[str] | None) -> dict[str, Any]:
    """Set the class names in the model's config, and return the previous ones."""
    config: Any = getattr(model, "config", None)
    if names is None or config is None:
        return {}
    had = {"id2label": config.id2label, "label2id": config.label2id}
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return had

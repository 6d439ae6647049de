"""Lookup of the modules that hold a model's parameters."""

from __future__ import annotations

from torch import nn

ModulePlace = tuple[nn.Module, str]
"""The module that holds a parameter, and the parameter's name there."""


def places_of(model: nn.Module) -> dict[str, list[ModulePlace]]:
    """Return, for every parameter, the modules that hold it and its name in each; several for tied weights."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places: dict[str, list[ModulePlace]] = {name: [] for name in names.values()}
    for module in model.modules():
        for local_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places[names[parameter]].append((module, local_name))
    return places

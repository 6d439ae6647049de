"""PEFT's LoRA layers: checking which layers can have LoRA, wrapping them, and unwrapping them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Protocol, TypeGuard

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapeft.errors import AdapeftError
from adapeft.model.places import ModulePlace, places_of
from adapeft.model.structure import is_called_layer, is_linear_layer

ADAPTER_NAME = "default"
"""PEFT's name for an unnamed adapter, under which its saved files are loaded."""
BASE_LAYER = "base_layer"
"""PEFT's name for the layer inside a LoRA layer."""
FACTORS = tuple(f"{piece}.{ADAPTER_NAME}.weight" for piece in ("lora_A", "lora_B"))
"""Names of A and B in a LoRA layer."""


class LowRank(Protocol):
    """The fields of a LoRA part that PEFT needs."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    def dim(self) -> int:
        """Dimension of the output neurons."""

    @property
    def rank(self) -> int:
        """Rank of the product."""

    @property
    def alpha(self) -> float:
        """Rank times the scaling factor."""


def check_layers(model: nn.Module, parts: Mapping[str, LowRank]) -> None:
    """Check that every LoRA is on the weight of one linear layer, with the output neurons along its ``dim``.

    Args:
        model: model to attach to.
        parts: LoRA by the name of its weight.

    Raises:
        AdapeftError: the layer is not linear, its weight is used in several places, or dim, rank or alpha is invalid.
    """
    places, paths = places_of(model), Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for name, part in parts.items():
        module, local_name = places[name][0]
        if local_name != "weight" or not is_linear_layer(module):
            raise AdapeftError(
                f"the subset has LoRA on {name!r}, a parameter of {type(module).__name__}: LoRA needs the weight of a "
                f"linear layer. Train rows or elements of it."
            )
        if not is_called_layer(model, _layer(name)):
            raise AdapeftError(
                f"the subset has LoRA on {name!r}, but its state-space mixer passes this weight to fused kernels "
                f"without calling the layer, so LoRA would have no effect. Train rows or elements of it."
            )
        if len(places[name]) > 1 or paths[module] > 1:
            raise AdapeftError(
                f"the subset has LoRA on {name!r}, which is tied and used in several places: LoRA would change only "
                f"one of them. Train rows or elements of it, which stay tied."
            )
        if part.dim != (1 if isinstance(module, Conv1D) else 0):
            raise AdapeftError(
                f"the subset's LoRA on {name!r} has its output neurons along dimension {part.dim}, but in "
                f"{type(module).__name__} they are along the other one."
            )
        if not (1 <= part.rank <= min(part.shape) and part.alpha > 0):
            raise AdapeftError(
                f"the subset's LoRA on {name!r} of shape {part.shape} has rank {part.rank} and alpha {part.alpha}: the "
                f"rank must be from 1 to the smaller side, and alpha above 0."
            )


def wrap(model: nn.Module, parts: Mapping[str, LowRank]) -> None:
    """Wrap the layers of ``parts`` in PEFT's, in place. Their weights are then named ``….base_layer.weight``.

    Raises:
        AdapeftError: PEFT rejects a layer, or wraps other layers or with other ranks; the model is unchanged.
    """
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        _inject(model, parts)
        _check_injected(model, parts)
    except BaseException:
        unwrap(model, _injected(model))
        for parameter, required in required_grad:
            parameter.requires_grad_(required)
        raise


def unwrap(model: nn.Module, names: Collection[str]) -> None:
    """Restore the base's layers: modules, names and classes are as before ``wrap``."""
    for name in names:
        path, _, layer = _layer(name).rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, layer, getattr(parent, layer).base_layer)
    vars(model).pop("peft_config", None)  # missing if PEFT refused before it changed anything


def switch(model: nn.Module, names: Collection[str], on: bool) -> None:
    """Make the wrapped layers with the weights ``names`` add their LoRA, or not; what requires gradients stays so."""
    for name in names:
        layer = model.get_submodule(_layer(name))
        assert isinstance(layer, LoraLayer)
        required_grad = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
        layer.enable_adapters(on)  # PEFT also freezes and unfreezes its factors here
        for parameter, required in required_grad:
            parameter.requires_grad_(required)


def set_factors(model: nn.Module, name: str, factors: Mapping[str, Tensor]) -> dict[str, ModulePlace]:
    """Set A and B of the wrapped layer with the weight ``name``.

    Returns:
        A and B → module that holds it, and its name there.
    """
    layer = model.get_submodule(_layer(name))
    assert isinstance(layer, LoraLayer)
    device = next(layer.get_base_layer().parameters()).device
    for piece, value in factors.items():
        getattr(layer, piece)[ADAPTER_NAME].weight = nn.Parameter(value.to(device))
    return {piece: (getattr(layer, piece)[ADAPTER_NAME], "weight") for piece in factors}


def is_adapted(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Whether ``module`` is a layer that ``wrap`` has made."""
    return isinstance(module, LoraLayer) and ADAPTER_NAME in module.lora_A


def low_rank_of(layer: LoraLayer) -> tuple[int, int, float]:
    """Return dim, rank and alpha of the LoRA in a layer that ``wrap`` has made."""
    dim = 1 if isinstance(layer.get_base_layer(), Conv1D) else 0
    return dim, layer.r[ADAPTER_NAME], layer.lora_alpha[ADAPTER_NAME]


def wrapped_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters in the layer that a LoRA layer wraps; none for any other module."""
    return [name for name, _ in module.get_base_layer().named_parameters()] if isinstance(module, LoraLayer) else []


def _inject(model: nn.Module, parts: Mapping[str, LowRank]) -> None:
    """Make PEFT wrap exactly the layers of ``parts``.

    Its matching of ``target_modules`` would wrap others: for a mixture of experts it treats them as transformers 4
    names and shortens them to their last component, which other layers share. So the layers are passed as keys of a
    state dict, which PEFT uses unchanged, and the targets match nothing.
    """
    config = _config(parts)
    targets, config.target_modules = config.target_modules, ["none"]
    keys = {f"{_layer(name)}.lora_A.weight": torch.empty(0) for name in parts}
    with warnings.catch_warnings():
        # PEFT detects Conv1D layers itself and warns; it also warns that targets and keys differ.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")
        try:
            inject_adapter_in_model(config, model, ADAPTER_NAME, state_dict=keys)
        except ValueError as error:
            raise AdapeftError(
                f"PEFT rejects LoRA on {len(parts)} layers, such as {_layer(next(iter(parts)))!r}: {error} Leave such "
                f"layers out with select.exclude, or train rows or elements of them."
            ) from error
    config.target_modules = targets


def _injected(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the LoRA layers in ``model`` by the names of the weights that they adapt."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {f"{path}.weight": layer for path, layer in layers.items()}


def _check_injected(model: nn.Module, parts: Mapping[str, LowRank]) -> None:
    """Check that PEFT has wrapped the layers of ``parts``, with their ranks and scales, and no others.

    Raises:
        AdapeftError: PEFT has wrapped other layers, or with other ranks or scales.
    """
    found = {
        name: (layer.r.get(ADAPTER_NAME), layer.scaling.get(ADAPTER_NAME)) for name, layer in _injected(model).items()
    }
    wanted = {name: (part.rank, part.alpha / part.rank) for name, part in parts.items()}
    if found != wanted:
        extra = sorted(found.keys() - wanted.keys())
        missing = sorted(wanted.keys() - found.keys())
        others = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
        raise AdapeftError(
            f"PEFT did not add LoRA to exactly the layers of the subset. Wrapped but not requested: {extra or 'none'}. "
            f"Requested but not wrapped: {missing or 'none'}. Wrong rank or scale: {others or 'none'}. Nothing was "
            f"attached. Train rows or elements of these layers, or install another version of peft."
        )


def _config(parts: Mapping[str, LowRank]) -> LoraConfig:
    """Return the PEFT config of LoRA on exactly these weights, each with its own rank and alpha."""
    layers = {re.escape(_layer(name)): part for name, part in parts.items()}
    return LoraConfig(
        target_modules="|".join(layers),
        rank_pattern={f"^{layer}": part.rank for layer, part in layers.items()},
        alpha_pattern={f"^{layer}": part.alpha for layer, part in layers.items()},
        fan_in_fan_out=any(part.dim == 1 for part in parts.values()),
    )


def _layer(name: str) -> str:
    return name.removesuffix(".weight")

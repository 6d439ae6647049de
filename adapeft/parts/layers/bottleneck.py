"""The module of an adapter, and functions that add it after a layer and remove it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapeft.model.places import ModulePlace

_NAME = "adapeft_adapter"


class Bottleneck(nn.Module):
    """x + U gelu(D x + b) + c, in float32 for any base dtype; D [bottleneck, width], U [width, bottleneck].

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019; the gelu is from their published code.
    The position is theirs: after the projection back to the block's width, before dropout and the block's residual.
    """

    def __init__(self, pieces: Mapping[str, Tensor]) -> None:
        super().__init__()
        bottleneck, width = pieces["down.weight"].shape
        self.down = nn.Linear(width, bottleneck, device="meta")
        self.up = nn.Linear(bottleneck, width, device="meta")
        self.is_on = True
        self.load_state_dict({name: nn.Parameter(piece) for name, piece in pieces.items()}, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add the bottleneck's output: x [..., width] → [..., width]."""
        inner = F.gelu(self.down(x.to(self.down.weight.dtype)))
        return x + self.up(inner).to(x.dtype)


def add_bottleneck(model: nn.Module, name: str, pieces: Mapping[str, Tensor]) -> dict[str, ModulePlace]:
    """Add an adapter after the layer ``name``, which other modules may have wrapped.

    The layer owns the adapter and calls it in a forward hook, so ZeRO and activation checkpointing handle it like any
    other module.

    Returns:
        Piece → module that holds it, and its name there.
    """
    layer = model.get_submodule(name)
    device = next(layer.parameters()).device
    adapter = Bottleneck({piece: value.to(device, torch.float32, copy=True) for piece, value in pieces.items()})
    layer.add_module(_NAME, adapter)
    adapter.__dict__["handle"] = layer.register_forward_hook(_adapted)
    places = {piece: piece.rpartition(".") for piece in pieces}
    return {piece: (adapter.get_submodule(path), local_name) for piece, (path, _, local_name) in places.items()}


def remove_bottleneck(model: nn.Module, name: str) -> None:
    """Remove the adapter after the layer ``name``."""
    layer = model.get_submodule(name)
    handle: RemovableHandle = layer.get_submodule(_NAME).__dict__["handle"]
    handle.remove()
    delattr(layer, _NAME)


def switch_bottleneck(model: nn.Module, name: str, on: bool) -> None:
    """Make the layer ``name`` apply its adapter, or not."""
    vars(model.get_submodule(name).get_submodule(_NAME))["is_on"] = on


def has_bottleneck(layer: nn.Module | None) -> bool:
    """Whether a layer has an adapter."""
    return hasattr(layer, _NAME)


def _adapted(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapter = layer.get_submodule(_NAME)
    adapted: Tensor = adapter(output) if adapter.is_on else output
    return adapted

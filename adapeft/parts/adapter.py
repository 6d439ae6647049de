"""Adapters: a small bottleneck after the output projection of a feed-forward network or of an attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from adapeft.draw import uniform
from adapeft.errors import AdapeftError
from adapeft.model.structure import is_called_layer, is_linear_layer
from adapeft.parts.part import Part

_NAME = "adapeft_adapter"


class Adapter(nn.Module):
    """x + U gelu(D x + b) + c, in float32 over any base; D [bottleneck, width], U [width, bottleneck].

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, whose published code has the gelu. It
    stands where theirs does: behind the projection back to the block's width, before dropout and the block's residual.
    """

    def __init__(self, pieces: Mapping[str, Tensor]) -> None:
        super().__init__()
        bottleneck, width = pieces["down.weight"].shape
        self.down = nn.Linear(width, bottleneck, device="meta")
        self.up = nn.Linear(bottleneck, width, device="meta")
        self.load_state_dict({name: nn.Parameter(piece) for name, piece in pieces.items()}, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] → the same."""
        inner = F.gelu(self.down(x.to(self.down.weight.dtype)))
        return x + self.up(inner).to(x.dtype)


def check_adapters(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Checks that every adapter part is for a linear layer of its width, and that there is none yet.

    Raises:
        AdapeftError: no such layer, another width, or an adapter.
    """
    modules = dict(model.named_modules())
    for name, part in parts.items():
        module = modules.get(name)
        if not is_linear_layer(module) or not is_called_layer(model, name):
            raise AdapeftError(
                f"the subset has an adapter behind {name!r}, which is no linear layer that this model calls."
            )
        if hasattr(module, _NAME):
            raise AdapeftError(f"{name!r} has an adapter already: revert the delta that brought it first.")
        shape = tuple(getattr(module.weight, "ds_shape", module.weight.shape))
        width = shape[1 if isinstance(module, Conv1D) else 0]
        if part.rank < 1:
            raise AdapeftError(f"the subset's adapter behind {name!r} has a bottleneck of {part.rank}: at least 1.")
        if part.shape != (width,):
            raise AdapeftError(
                f"the subset's adapter behind {name!r} is for a width of {part.shape[0]}, this model's is {width}: it "
                f"was chosen for another model."
            )


def starting_pieces(name: str, part: Part, seed: int) -> dict[str, Tensor]:
    """An adapter that changes nothing yet: U, b and c zero, D uniform within 1/√width from seed and name alone."""
    pieces = {piece: torch.zeros(shape) for piece, shape in part.pieces.items()}
    drawn = uniform(seed, 0, name, part.pieces["down.weight"], "cpu")
    return {**pieces, "down.weight": (2 * drawn - 1) / math.sqrt(part.shape[0])}


def add_adapter(model: nn.Module, name: str, pieces: Mapping[str, Tensor]) -> dict[str, tuple[nn.Module, str]]:
    """Puts an adapter behind the layer ``name``, whatever wraps that by now.

    The layer owns it and calls it in a hook. So it is a module like any other for those who gather and recompute.

    Returns:
        Piece → the module that holds it, and its name there.
    """
    layer = model.get_submodule(name)
    device = next(layer.parameters()).device
    adapter = Adapter({piece: value.to(device, torch.float32, copy=True) for piece, value in pieces.items()})
    layer.add_module(_NAME, adapter)
    adapter.__dict__["handle"] = layer.register_forward_hook(_adapted)
    places = {piece: piece.rpartition(".") for piece in pieces}
    return {piece: (adapter.get_submodule(path), local_name) for piece, (path, _, local_name) in places.items()}


def remove_adapter(model: nn.Module, name: str) -> None:
    """Takes the adapter behind the layer ``name`` away."""
    layer = model.get_submodule(name)
    handle: RemovableHandle = layer.get_submodule(_NAME).__dict__["handle"]
    handle.remove()
    delattr(layer, _NAME)


def has_adapter(layer: nn.Module) -> bool:
    """Whether an adapter stands behind a layer."""
    return hasattr(layer, _NAME)


def _adapted(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapted: Tensor = layer.get_submodule(_NAME)(output)
    return adapted

"""Adapters: a small bottleneck after the output projection of a feed-forward network or attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapeft.draw import uniform
from adapeft.errors import AdapeftError
from adapeft.parts.layers.bottleneck import add_bottleneck, has_bottleneck, remove_bottleneck, switch_bottleneck
from adapeft.parts.part import AddedPart, Attached, PartHeader, Site


@dataclass(frozen=True)
class Adapter(AddedPart):
    """A bottleneck on the output of a layer; the part has the layer's name.

    Attributes:
        rank: width of the bottleneck.
    """

    rank: int

    kind = "adapter"
    changes_parameter = False
    scaling_pieces = ("up.weight", "up.bias")

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        (width,) = self.shape
        down, up = {"down.weight": (self.rank, width), "down.bias": (self.rank,)}, {"up.weight": (width, self.rank)}
        return {**down, **up, "up.bias": (width,)}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "rank": self.rank, "alpha": 0.0}

    @classmethod
    def read(cls, header: PartHeader, indices: Tensor | None) -> Self:
        return cls(tuple(header.shape), header.rank)

    def check(self, path: str | Path, name: str) -> None:
        if len(self.shape) != 1 or self.rank < 1:
            raise AdapeftError(
                f"{path}: the adapter of {name!r} has a bottleneck of {self.rank!r} and shape {self.shape}: the "
                f"bottleneck must be at least 1, and the shape a single width."
            )

    # --- in a model ---

    @classmethod
    def check_layers(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Check that every adapter belongs to a linear layer of its width that has no adapter yet.

        Raises:
            AdapeftError: there is no such layer, its width differs, or it has an adapter already.
        """
        # Takes seconds to import, and files do not need it.
        from adapeft.model.dense import logical_shape
        from adapeft.model.structure import is_called_layer, is_linear_layer

        modules = dict(model.named_modules())
        for name, part in parts.items():
            module = modules.get(name)
            if not is_linear_layer(module) or not is_called_layer(model, name):
                raise AdapeftError(
                    f"the subset has an adapter after {name!r}, which is not a linear layer that this model calls."
                )
            if has_bottleneck(module):
                raise AdapeftError(f"{name!r} has an adapter already: revert the delta that added it first.")
            if part.rank < 1:
                raise AdapeftError(
                    f"the subset's adapter after {name!r} has a bottleneck of {part.rank}: it must be at least 1."
                )
            shape = logical_shape(module, "weight")
            width = shape[1 if isinstance(module, Conv1D) else 0]
            if part.shape != (width,):
                raise AdapeftError(
                    f"the subset's adapter after {name!r} has width {part.shape[0]}, but the layer of this model has "
                    f"width {width}: the subset was chosen for another model."
                )

    def attach(self, site: Site) -> Attached:
        """Add an adapter that changes nothing yet: U, b, c zero, D uniform in ±1/√width, from seed and name alone."""
        pieces = {piece: torch.zeros(shape) for piece, shape in self.pieces.items()}
        drawn = uniform(site.seed, 0, site.name, self.pieces["down.weight"], "cpu")
        pieces["down.weight"] = (2 * drawn - 1) / math.sqrt(self.shape[0])
        return Attached(add_bottleneck(site.model, site.name, pieces))

    @classmethod
    def remove(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        for name in parts:
            remove_bottleneck(model, name)

    @classmethod
    def switch(cls, model: nn.Module, parts: Mapping[str, Self], on: bool) -> None:
        for name in parts:
            switch_bottleneck(model, name, on)

    def install(self, model: nn.Module, name: str, values: Tensor) -> None:
        for module, local_name in add_bottleneck(model, name, self.split(values)).values():
            module.get_parameter(local_name).requires_grad_(False)

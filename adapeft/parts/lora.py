"""LoRA: a product of two small matrices that is added to a linear layer's weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from adapeft.draw import uniform
from adapeft.errors import AdapeftError
from adapeft.parts.part import AddedPart, Attached, PartAndValues, PartHeader, Site


@dataclass(frozen=True)
class Lora(AddedPart):
    """W + (alpha / rank) · B A, A [rank, in], B [out, rank], both float32 for any base dtype.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. The layer is wrapped in PEFT's layer. A
    is drawn as in PEFT, uniformly in ±1/√in, but from seed and name alone; B = 0, so the output starts as the base's.

    Attributes:
        dim: dimension of the output neurons.
        rank: rank of the product.
        alpha: rank times the scaling factor of the product.
    """

    dim: int
    rank: int
    alpha: float

    kind = "lora"
    adds_to_output = True
    scaling_pieces = ("lora_B",)

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (self.rank, self.shape[1 - self.dim]), "lora_B": (self.shape[self.dim], self.rank)}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "dim": self.dim, "rank": self.rank, "alpha": self.alpha}

    @classmethod
    def read(cls, header: PartHeader, indices: Tensor | None) -> Self:
        return cls(tuple(header.shape), header.dim, header.rank, header.alpha)

    def check(self, path: str | Path, name: str) -> None:
        if len(self.shape) != 2 or self.dim not in (0, 1) or not 1 <= self.rank <= min(self.shape):
            raise AdapeftError(
                f"{path}: {name!r} of shape {self.shape} has a LoRA of rank {self.rank!r} along dimension "
                f"{self.dim!r}: LoRA needs a matrix, a dimension of 0 or 1, and a rank from 1 to the smaller side."
            )
        if not self.alpha > 0:
            raise AdapeftError(f"{path}: the LoRA of {name!r} has alpha {self.alpha!r}: it must be above 0.")

    # --- in a model ---

    @classmethod
    def check_layers(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Check that every part is on the weight of one linear layer.

        Raises:
            AdapeftError: the layer is not linear, its weight is used in several places, or rank or alpha is invalid.
        """
        from adapeft.parts.layers.lora import check_layers  # takes seconds to import, and files do not need it

        check_layers(model, parts)

    @classmethod
    def prepare(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Wrap the layers in PEFT's, in place. Their weights are then named ``….base_layer.weight``."""
        from adapeft.parts.layers.lora import wrap

        wrap(model, parts)

    def attach(self, site: Site) -> Attached:
        from adapeft.parts.layers.lora import set_factors

        drawn = (2 * uniform(site.seed, 0, site.name, self.pieces["lora_A"], "cpu") - 1) / math.sqrt(
            self.shape[1 - self.dim]
        )
        factors = {"lora_A": drawn, "lora_B": torch.zeros(self.pieces["lora_B"])}
        return Attached(set_factors(site.model, site.name, factors))

    def install(self, model: nn.Module, name: str, values: Tensor) -> None:
        from adapeft.parts.layers.lora import set_factors

        for module, local_name in set_factors(model, name, self.split(values)).values():
            module.get_parameter(local_name).requires_grad_(False)

    @classmethod
    def remove(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Restore the base's layers: modules, names and classes are as before ``prepare``."""
        from adapeft.parts.layers.lora import unwrap

        unwrap(model, parts)

    @classmethod
    def switch(cls, model: nn.Module, parts: Mapping[str, Self], on: bool) -> None:
        from adapeft.parts.layers.lora import switch

        switch(model, parts, on)

    # --- the trained difference of a parameter ---

    @torch.no_grad()
    def difference(self, values: Tensor) -> Tensor:
        """Return (alpha / rank) · B A in the shape of the parameter and the dtype of ``values`` [count]."""
        pieces = self.split(values)
        product = pieces["lora_B"] @ pieces["lora_A"] * (self.alpha / self.rank)
        return product if self.dim == 0 else product.t()

    @classmethod
    def sum_of(cls, terms: Sequence[tuple[float, Self, Tensor]]) -> PartAndValues | None:
        """Return Σ w (α/r) B A = [w₁ (α₁/r₁) B₁ …] [A₁; …], exact except for the rounding of B.

        None if the result would be larger than the matrix, or if the parts differ in ``dim``.
        """
        first, rank = terms[0][1], sum(part.rank for _, part, _ in terms)
        if any(part.dim != first.dim for _, part, _ in terms) or rank * sum(first.shape) > math.prod(first.shape):
            return None
        a, b = [], []
        for weight, part, values in terms:
            pieces = part.split(values)
            a.append(pieces["lora_A"])
            b.append((pieces["lora_B"].double() * (weight * part.alpha / part.rank)).float())
        stacked = cls(first.shape, first.dim, rank, float(rank))
        return stacked, stacked.joined([torch.cat(a), torch.cat(b, dim=1)])

"""LoRA: a product of two small matrices beside a linear layer's weight."""

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
    """W + (alpha / rank) · B A, A [rank, in], B [out, rank], both float32 over any base.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. The layer is wrapped in PEFT's. A is
    drawn as PEFT does, uniformly within 1/√in, but from seed and name alone; B = 0, so the output starts as the base's.

    Attributes:
        dim: the dimension of the output neurons.
        rank: of the product.
        alpha: rank times the factor of the product.
    """

    dim: int
    rank: int
    alpha: float

    kind = "lora"
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
                f"{self.dim!r}: a matrix takes ranks from 1 to its smaller side."
            )
        if not self.alpha > 0:
            raise AdapeftError(f"{path}: the LoRA of {name!r} has alpha {self.alpha!r}, not above 0.")

    # --- in a model ---

    @classmethod
    def check_layers(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Checks that every part is on the weight of one linear layer.

        Raises:
            AdapeftError: another kind of layer, a weight that several places use, or a rank or alpha that does nothing.
        """
        from adapeft.parts.lora_layers import check_layers  # takes seconds to import, and files do not need it

        check_layers(model, parts)

    @classmethod
    def prepare(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Wraps the layers in PEFT's, in place. Their weights are then named ``….base_layer.weight``."""
        from adapeft.parts.lora_layers import wrap

        wrap(model, parts)

    def attach(self, site: Site) -> Attached:
        from adapeft.parts.lora_layers import set_factors

        drawn = (2 * uniform(site.seed, 0, site.name, self.pieces["lora_A"], "cpu") - 1) / math.sqrt(
            self.shape[1 - self.dim]
        )
        factors = {"lora_A": drawn, "lora_B": torch.zeros(self.pieces["lora_B"])}
        return Attached(set_factors(site.model, site.name, factors))

    @classmethod
    def remove(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Puts the base's own layers back: modules, names and classes are as before ``prepare``."""
        from adapeft.parts.lora_layers import unwrap

        unwrap(model, parts)

    # --- what training adds to a parameter ---

    @torch.no_grad()
    def difference(self, values: Tensor) -> Tensor:
        """(alpha / rank) · B A in the shape of the parameter and the dtype of ``values`` [count]."""
        pieces = self.split(values)
        product = pieces["lora_B"] @ pieces["lora_A"] * (self.alpha / self.rank)
        return product if self.dim == 0 else product.t()

    @classmethod
    def sum_of(cls, terms: Sequence[tuple[float, Self, Tensor]]) -> PartAndValues | None:
        """Σ w (α/r) B A = [w₁ (α₁/r₁) B₁ …] [A₁; …], exact except for the rounding of B; None for what is no smaller
        than the matrix.
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

"""A part: what is trained of one parameter, or behind one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from pydantic import FiniteFloat, NonNegativeInt, model_validator
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.files.damage import MOST, Header

Kind = Literal["tensor", "rows", "elements", "dense", "lora", "adapter"]


@dataclass(frozen=True)
class Part:
    """What is trained of one parameter, or behind one layer.

    Attributes:
        kind: the whole ``tensor``, ``rows`` of a matrix, single ``elements``, or ``dense``: every element's difference
            to the base, under the rule that ``Subset.description`` names; or ``lora``: the matrix plus
            (alpha / rank) · B A. An ``adapter`` belongs to a layer, whose name it has, and works on its output.
        shape: of the parameter; the width of an adapter's layer.
        indices: int64, ascending; rows along ``dim``, or positions in the flattened parameter; None for the
            whole parameter.
        dim: the dimension that rows are counted along; for ``lora`` that of the output neurons.
        rank: of ``lora``, or the width of an adapter's bottleneck.
        alpha: of ``lora``.
    """

    kind: Kind
    shape: tuple[int, ...]
    indices: Tensor | None = None
    dim: int = 0
    rank: int = 0
    alpha: float = 0.0

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that the part adds to the model, by name; none where it trains what is there."""
        if self.kind == "lora":
            return {"lora_A": (self.rank, self.shape[1 - self.dim]), "lora_B": (self.shape[self.dim], self.rank)}
        if self.kind == "adapter":
            (width,) = self.shape
            down, up = {"down.weight": (self.rank, width), "down.bias": (self.rank,)}, {"up.weight": (width, self.rank)}
            return {**down, **up, "up.bias": (width,)}
        return {}

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """The pieces that ``values`` [count] holds one after another."""
        sizes = [torch.Size(shape).numel() for shape in self.pieces.values()]
        cuts = zip(self.pieces.items(), values.split(sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in cuts}

    @property
    def count(self) -> int:
        """Number of trained elements."""
        if self.pieces:
            return sum(torch.Size(shape).numel() for shape in self.pieces.values())
        total = int(torch.Size(self.shape).numel())
        if self.indices is None:
            return total
        return len(self.indices) * (total // self.shape[self.dim] if self.kind == "rows" else 1)

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Which elements of the flattened parameter, from ``start`` to before ``stop``, are trained in place.

        Returns:
            bool [stop - start].
        """
        stop = torch.Size(self.shape).numel() if stop is None else stop
        if self.indices is None:
            return torch.ones(stop - start, dtype=torch.bool)
        positions = torch.arange(start, stop)
        if self.kind == "rows":
            positions = positions // torch.Size(self.shape[self.dim + 1 :]).numel() % self.shape[self.dim]
        return torch.isin(positions, self.indices)

    def describe(self) -> dict[str, Any]:
        """All but the indices, for the header of a file."""
        numbers = {"rank": self.rank, "alpha": self.alpha} if self.pieces else {}
        return {"kind": self.kind, "shape": self.shape, "dim": self.dim, **numbers}

    @classmethod
    def of(cls, entry: Mapping[str, Any], indices: Tensor | None) -> Part:
        """The inverse of ``describe``; ``check_part`` says whether the numbers go together."""
        said = _PartHeader.model_validate(entry)
        return cls(said.kind, tuple(said.shape), indices, said.dim, said.rank, said.alpha)  # type: ignore[arg-type]


class _PartHeader(Header):
    kind: str
    shape: list[NonNegativeInt]
    dim: NonNegativeInt
    rank: NonNegativeInt = 0
    alpha: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _can_be_counted(self) -> Self:
        """torch counts in 64 bits and wraps round without a word."""
        if math.prod(max(size, 1) for size in (*self.shape, self.rank)) > MOST:
            raise ValueError(f"shape {self.shape} and rank {self.rank} are of no model")
        return self


def load_part(path: str | Path, name: str, entry: Mapping[str, Any], indices: Tensor | None) -> Part:
    """The part that a file describes; within ``reading``.

    Raises:
        AdapeftError: its indices, shape and rank do not go together.
    """
    if indices is not None and indices.dtype not in (torch.int32, torch.int64):
        raise AdapeftError(f"{path}: the indices of {name!r} are {indices.dtype}, not int32 or int64.")
    part = Part.of(entry, None if indices is None else indices.long())
    check_part(path, name, part)
    return part


def check_part(path: str | Path, name: str, part: Part) -> None:
    """Checks that a loaded part's indices lie in its shape, strictly ascending, and that a rank fits it.

    Raises:
        AdapeftError: they do not.
    """
    if part.kind not in get_args(Kind) or (part.kind in ("rows", "elements")) != (part.indices is not None):
        raise AdapeftError(f"{path}: {name!r} is of kind {part.kind!r}, which does not go with its indices.")
    if part.kind == "lora" and (
        len(part.shape) != 2 or part.dim not in (0, 1) or not 1 <= part.rank <= min(part.shape)
    ):
        raise AdapeftError(
            f"{path}: {name!r} of shape {part.shape} has a LoRA of rank {part.rank!r} along dimension {part.dim!r}: a "
            f"matrix takes ranks from 1 to its smaller side."
        )
    if part.kind == "lora" and not part.alpha > 0:
        raise AdapeftError(f"{path}: the LoRA of {name!r} has alpha {part.alpha!r}, not above 0.")
    if part.kind == "adapter" and (len(part.shape) != 1 or part.rank < 1):
        raise AdapeftError(f"{path}: the adapter of {name!r} has a bottleneck of {part.rank!r} at shape {part.shape}.")
    if part.indices is None:
        return
    limit = part.shape[part.dim] if part.kind == "rows" else int(torch.Size(part.shape).numel())
    ascending = bool((part.indices[1:] > part.indices[:-1]).all()) if part.indices.ndim == 1 else False
    if not (limit and ascending) or (
        len(part.indices) and not 0 <= int(part.indices[0]) <= int(part.indices[-1]) < limit
    ):
        raise AdapeftError(f"{path}: the indices of {name!r} are not ascending within 0 … {limit - 1}.")


def compact_indices(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """int32 where the parameter allows it: with a float32 value 8 bytes a trained element."""
    return indices.to(torch.int32 if torch.Size(shape).numel() < 2**31 else torch.int64).cpu()

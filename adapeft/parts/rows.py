"""Rows: slices of a parameter along one dimension, such as the output neurons of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from adapeft.parts.indexed import Indexed
from adapeft.parts.layers.leaves import Held
from adapeft.parts.part import PartHeader


@dataclass(frozen=True, eq=False)
class Rows(Indexed):
    """Slices of a parameter. The leaf has its shape, with ``dim`` moved to the front and reduced to the chosen rows.

    Attributes:
        dim: dimension that the rows are slices along.
    """

    dim: int = 0

    kind = "rows"

    @property
    def limit(self) -> int:
        return self.shape[self.dim]

    @property
    def count(self) -> int:
        return len(self.indices) * (torch.Size(self.shape).numel() // self.shape[self.dim])

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.shape[: self.dim], *self.shape[self.dim + 1 :])

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        positions = torch.arange(start, torch.Size(self.shape).numel() if stop is None else stop)
        return torch.isin(positions // self._stride % self.shape[self.dim], self.indices)

    def whole_rows(self, num_rows: int) -> Tensor:
        return self.indices

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "dim": self.dim}

    @classmethod
    def read(cls, header: PartHeader, indices: Tensor | None) -> Self:
        assert indices is not None
        return cls(tuple(header.shape), indices, header.dim)

    def difference(self, values: Tensor) -> Tensor:
        return values.movedim(0, self.dim)

    def touched(self, parameter: Tensor) -> Tensor:
        return parameter.detach().index_select(self.dim, self.indices.to(parameter.device))

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        parameter.index_copy_(self.dim, self.indices.to(parameter.device), entries)

    def gather(self, dense: Tensor) -> Tensor:
        return dense.movedim(self.dim, 0)[self.indices]

    def entries(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        before = torch.arange(torch.Size(self.shape[: self.dim]).numel()) * self.shape[self.dim] * self._stride
        within = before[:, None] + torch.arange(self._stride)
        positions, order = (self.indices[:, None, None] * self._stride + within).flatten().sort()
        return positions, values.flatten()[order]

    @property
    def _stride(self) -> int:
        return torch.Size(self.shape[self.dim + 1 :]).numel()

    # --- in a module ---

    def added_to(self, parameter: Tensor, held: Held, training: bool) -> Tensor:
        leaf = held.leaves[0].to(parameter.dtype)
        return parameter.index_add(self.dim, held.buffers["indices"], leaf.movedim(0, self.dim))

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held, training: bool, transposed: bool
    ) -> Tensor:
        """Apply the layer: output neurons without a dense gradient, input dimensions through the dense sum."""
        if self.dim != (1 if transposed else 0):
            total = self.added_to(weight, held, training)
            return F.linear(x, total.t() if transposed else total, bias)
        return self._with_rows(F.linear(x, weight.t() if transposed else weight, bias), x, held)

    def added_to_output(self, output: Tensor, x: Tensor, shape: tuple[int, int], held: Held, training: bool) -> Tensor:
        if self.dim != 0:
            return super().added_to_output(output, x, shape, held, training)
        return self._with_rows(output, x, held)

    def _with_rows(self, output: Tensor, x: Tensor, held: Held) -> Tensor:
        rows = F.linear(x, held.leaves[0].to(x.dtype)).to(output.dtype)
        return output.index_add(-1, held.buffers["indices"], rows)

    @property
    def looks_up(self) -> bool:
        return self.dim == 0

    def look_up(self, tokens: Tensor, weight: Tensor, held: Held, padding_idx: int | None) -> Tensor:
        leaf, rows = held.leaves[0], held.buffers["indices"]
        place = torch.searchsorted(rows, tokens.contiguous()).clamp(max=len(rows) - 1)
        hit = (rows[place] == tokens).unsqueeze(-1)
        looked_up = F.embedding(place, leaf)
        if padding_idx is not None:
            # nn.Embedding gives the padding row no gradient, so its leaf gets none either.
            padding = tokens.eq(padding_idx).unsqueeze(-1)
            looked_up = torch.where(padding, looked_up.detach(), looked_up)
        output = F.embedding(tokens, weight, padding_idx)
        return output + torch.where(hit, looked_up, 0.0).to(output.dtype)

"""Elements: single entries of a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapeft.parts.indexed import Indexed
from adapeft.parts.layers.functions import ElementsLinear
from adapeft.parts.layers.leaves import Held

_SMALLER = 4
"""Minimum ratio of matrix to block size at which the block's gradient is worth copies of its rows and columns."""


@dataclass(frozen=True, eq=False)
class Elements(Indexed):
    """Single entries, at ``indices`` of the flattened parameter; the leaf has shape [k]."""

    kind = "elements"

    @property
    def limit(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (len(self.indices),)

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        # Of SmolLM2-135M, torch.isin took 53 s where this takes one.
        stop = self.limit if stop is None else stop
        mask = torch.zeros(stop - start, dtype=torch.bool)
        mask[self.indices[(self.indices >= start) & (self.indices < stop)] - start] = True
        return mask

    def touched(self, parameter: Tensor) -> Tensor:
        place = self.indices.to(parameter.device)
        return parameter.detach()[torch.unravel_index(place, parameter.shape)]

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        # Indexed by position in the parameter, independent of its memory layout.
        parameter[torch.unravel_index(self.indices.to(parameter.device), parameter.shape)] = entries

    def gather(self, dense: Tensor) -> Tensor:
        return dense.flatten()[self.indices]

    def entries(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        return self.indices, values

    # --- in a module ---

    def buffers(self, is_linear: bool) -> dict[str, Tensor]:
        block = self._block() if is_linear else {}
        return {"indices": self.indices, **{f"indices_{piece}": index for piece, index in block.items()}}

    def added_to(self, parameter: Tensor, held: Held, training: bool) -> Tensor:
        leaf = held.leaves[0].to(parameter.dtype)
        return parameter.flatten().index_add(0, held.buffers["indices"], leaf).view(parameter.shape)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held, training: bool, transposed: bool
    ) -> Tensor:
        """Apply the layer without saving a dense sum for the backward pass."""
        found = held.buffers
        block = (
            (found["indices_rows"], found["indices_columns"], found["indices_places"])
            if "indices_rows" in found
            else None
        )
        return ElementsLinear.apply(x, weight, bias, held.leaves[0], found["indices"], block, transposed)

    def _block(self) -> dict[str, Tensor]:
        """Return the rows and columns that contain the elements, and the elements' flat positions in that block.

        Empty if the block is not much smaller than the matrix; the gradient is then gathered from the whole matrix.
        """
        if len(self.shape) != 2:
            return {}
        row, column = self.indices // self.shape[1], self.indices % self.shape[1]
        rows, columns = (torch.bincount(index).nonzero().squeeze(1) for index in (row, column))
        if _SMALLER * len(rows) * len(columns) > math.prod(self.shape):
            return {}
        places = torch.searchsorted(rows, row) * len(columns) + torch.searchsorted(columns, column)
        return {"rows": rows, "columns": columns, "places": places}

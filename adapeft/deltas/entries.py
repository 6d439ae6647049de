"""The entries of a parameter that a change moves: from any kind of part, and back to the smallest that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapeft.parts.change import Change
from adapeft.parts.lora import low_rank_sum
from adapeft.parts.part import Part, compact_indices


@dataclass(frozen=True)
class Entries:
    """Differences by place.

    Attributes:
        positions: int64 [count], ascending, in the flattened parameter; None for all of it.
        values: float64 [count].
    """

    positions: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, change: Change) -> Entries:
        """What ``change`` adds to its parameter; of LoRA the product, dense. Adapters have no such entries."""
        part, values = change.part, change.values.double()
        if part.kind == "lora":
            values = low_rank_sum(part, values)
        if part.indices is None:
            return cls(None, values.flatten())
        if part.kind == "elements":
            return cls(part.indices, values)
        positions, order = _positions_of_rows(part).sort()
        return cls(positions, values.flatten()[order])

    def shared(self, other: Entries) -> tuple[Tensor, Tensor]:
        """The two values of every entry that both have, [count] each."""
        if self.positions is None:
            picked = self.values if other.positions is None else self.values[other.positions]
            return picked, other.values
        if other.positions is None:
            return self.values, other.values[self.positions]
        place = torch.searchsorted(other.positions, self.positions)
        hit = place < len(other.positions)
        hit[hit.clone()] = other.positions[place[hit]] == self.positions[hit]
        return self.values[hit], other.values[place[hit]]


def weighted_sum(entries: Sequence[Entries], weights: Sequence[float], size: int) -> Entries:
    """Σ weight · entries of one parameter of ``size`` elements, on the union of their positions."""
    known = [own.positions for own in entries if own.positions is not None]
    union = torch.cat(known).unique() if len(known) == len(entries) else None
    total = torch.zeros(size if union is None else len(union), dtype=torch.float64)
    for weight, own in zip(weights, entries, strict=True):
        if own.positions is None:
            total += weight * own.values
        else:
            place = own.positions if union is None else torch.searchsorted(union, own.positions)
            total.index_add_(0, place, weight * own.values)
    return Entries(union, total)


def smallest_change(entries: Entries, shape: tuple[int, ...]) -> Change | None:
    """The part kind of fewest bytes that holds the entries other than zero, in float32; None when there are none."""
    values = entries.values.float()
    kept = values.nonzero().squeeze(1)
    if not len(kept):
        return None
    values, positions = values[kept], kept if entries.positions is None else entries.positions[kept]
    parts = [Part("elements", shape, positions)]
    if len(shape) > 1:
        parts += [Part("rows", shape, _rows_of(positions, shape, dim), dim) for dim in range(len(shape))]
    part = min([*parts, Part("tensor", shape)], key=_num_bytes)
    if part.kind == "elements":
        return Change(part, values)
    dense = torch.zeros(torch.Size(shape).numel())
    dense[positions] = values
    if part.kind == "tensor":
        return Change(part, dense.view(shape))
    assert part.indices is not None
    return Change(part, dense.view(shape).movedim(part.dim, 0)[part.indices])


def _num_bytes(part: Part) -> int:
    """Of float32 values and indices in a file."""
    return 4 * part.count + (0 if part.indices is None else compact_indices(part.indices, part.shape).nbytes)


def _rows_of(positions: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """int64, ascending: the rows along ``dim`` that have one of the positions."""
    hit = torch.zeros(shape[dim], dtype=torch.bool)
    hit[positions // torch.Size(shape[dim + 1 :]).numel() % shape[dim]] = True
    return hit.nonzero().squeeze(1)


def _positions_of_rows(part: Part) -> Tensor:
    """int64 [count]: where the values of a leaf of rows belong in the flattened parameter."""
    assert part.indices is not None
    stride = torch.Size(part.shape[part.dim + 1 :]).numel()
    before = torch.arange(torch.Size(part.shape[: part.dim]).numel()) * part.shape[part.dim] * stride
    return (part.indices[:, None, None] * stride + before[:, None] + torch.arange(stride)).flatten()

"""Conversion of changes to the entries of a parameter, and back to the kind of part with the fewest bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapeft.parts.change import Change
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole


@dataclass(frozen=True)
class Entries:
    """Differences of single entries of a parameter.

    Attributes:
        positions: int64 [count], ascending indices into the flattened parameter; None for all entries.
        values: float64 [count].
    """

    positions: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, change: Change) -> Entries:
        """Return the entries that ``change`` adds, for LoRA the dense product. Adapters behind a layer have none."""
        return cls(*change.part.entries(change.values.double()))

    def shared(self, other: Entries) -> tuple[Tensor, Tensor]:
        """Return the two values of every entry that both have, [count] each."""
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
    """Return Σ weight · entries on the union of their positions, for one parameter of ``size`` elements."""
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
    """Return the non-zero entries in float32, as the kind of part with the fewest bytes; None if there are none."""
    values = entries.values.float()
    kept = values.nonzero().squeeze(1)
    if not len(kept):
        return None
    values, positions = values[kept], kept if entries.positions is None else entries.positions[kept]
    parts: list[Part] = [Elements(shape, positions)]
    if len(shape) > 1:
        parts += [Rows(shape, _rows_of(positions, shape, dim), dim) for dim in range(len(shape))]
    part = min([*parts, Whole(shape)], key=lambda part: part.num_bytes)
    dense = torch.zeros(torch.Size(shape).numel())
    dense[positions] = values
    return Change(part, part.gather(dense.view(shape)))


def _rows_of(positions: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """Return the rows along ``dim`` that contain a position: int64, ascending."""
    hit = torch.zeros(shape[dim], dtype=torch.bool)
    hit[positions // torch.Size(shape[dim + 1 :]).numel() % shape[dim]] = True
    return hit.nonzero().squeeze(1)

"""Agreement and conflicts of two deltas of one base, entry by entry.

Entries of opposite sign cancel in a sum: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models",
NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapeft.deltas.arithmetic import check_same_base
from adapeft.deltas.delta import Delta
from adapeft.deltas.entries import Entries


@dataclass(frozen=True)
class Overlap:
    """Entries that two deltas a and b both change, in one parameter or in several.

    Attributes:
        counts: numbers of entries that a and b change.
        both: number of entries that both change.
        opposite: number of these that change in opposite directions.
        products: Σ a·b.
        opposed: −Σ a·b over the opposite entries.
        squares: Σ a² and Σ b² over the entries that both change.
    """

    counts: tuple[int, int] = (0, 0)
    both: int = 0
    opposite: int = 0
    products: float = 0.0
    opposed: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            (self.counts[0] + other.counts[0], self.counts[1] + other.counts[1]),
            self.both + other.both,
            self.opposite + other.opposite,
            self.products + other.products,
            self.opposed + other.opposed,
            (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]),
        )

    @property
    def opposite_share(self) -> float:
        """Fraction of opposite entries among those that both change; nan if there are none."""
        return self.opposite / self.both if self.both else math.nan

    @property
    def cosine(self) -> float:
        """Cosine of a and b over the entries that both change; nan if there are none."""
        return _ratio(self.products, self.squares)


@dataclass(frozen=True)
class Conflict:
    """Comparison of two deltas.

    Attributes:
        overlaps: name of a parameter that both change → overlap.
        norms: ‖a‖² and ‖b‖² over all entries of the base that each of them changes.
        adapters: layers behind which both have an adapter; these cannot be added.
        heads: new parameters and buffers that both have, with different values.
    """

    overlaps: Mapping[str, Overlap]
    norms: tuple[float, float]
    adapters: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def total(self) -> Overlap:
        """Overlap over all parameters."""
        return sum(self.overlaps.values(), Overlap())

    @property
    def cosine(self) -> float:
        """Cosine of the two whole deltas; nan if one of them changes nothing."""
        return _ratio(self.total.products, self.norms)

    def lost(self, overlap: Overlap) -> float:
        """Return by how much the opposite entries of ``overlap`` lower ``cosine``; nan if it is nan."""
        return _ratio(overlap.opposed, self.norms)


def conflict_of(a: Delta, b: Delta) -> Conflict:
    """Compare two deltas of one base. An entry counts as changed if its difference is not zero.

    Raises:
        AdapeftError: the deltas have different bases.
    """
    check_same_base({"a": a, "b": b})
    overlaps: dict[str, Overlap] = {}
    norms = [0.0, 0.0]
    for name in {**a.changes, **b.changes}:
        found = [delta.changes.get(name) for delta in (a, b)]
        entries = [
            Entries.of(change) if change is not None and change.part.changes_parameter else None for change in found
        ]
        for index, own in enumerate(entries):
            norms[index] += 0.0 if own is None else float(own.values.square().sum())
        if entries[0] is not None and entries[1] is not None:
            overlaps[name] = _overlap(entries[0], entries[1])
    adapters = (name for name, change in a.changes.items() if not change.part.changes_parameter and name in b.changes)
    heads = (
        name
        for mine, other in ((a.new, b.new), (a.buffers, b.buffers))
        for name, value in mine.items()
        if name in other and not torch.equal(value, other[name])
    )
    return Conflict(overlaps, (norms[0], norms[1]), tuple(adapters), tuple(heads))


def _overlap(a: Entries, b: Entries) -> Overlap:
    x, y = a.shared(b)
    both = (x != 0) & (y != 0)
    x, y = x[both], y[both]
    products = x * y
    opposed = products[x.sign() != y.sign()]
    return Overlap(
        (int(a.values.count_nonzero()), int(b.values.count_nonzero())),
        len(x),
        len(opposed),
        float(products.sum()),
        -float(opposed.sum()),
        (float(x.square().sum()), float(y.square().sum())),
    )


def _ratio(products: float, squares: tuple[float, float]) -> float:
    return products / math.sqrt(squares[0] * squares[1]) if all(squares) else math.nan

"""A budget in bytes: what a device has left for the subset once everything that does not depend on it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.memory.estimate import INDEX, Load, Zero, bytes_per_element, memory, moments
from adapeft.subset.subset import Subset


@dataclass(frozen=True)
class MemoryLimit:
    """The limit, and the price of an element.

    Attributes:
        limit: bytes that training may hold on a device.
        room: of these for what is trained within the budget.
        whole: bytes for each element of a tensor that is trained whole.
        leaf: bytes for each element of a row, or for a single element.
    """

    limit: int
    room: int
    whole: float
    leaf: float

    @classmethod
    def of(cls, limit: int, fixed: Load, zero: Zero, *, keeps_base: bool) -> MemoryLimit:
        """What ``fixed``, a load without any part of the budget, leaves of ``limit``.

        A step has two worst moments, each with its own rest and its own price of an element. The prices here are in
        bytes of the smaller rest, the higher of the two: what they allow is within both.

        Raises:
            AdapeftError: nothing is left.
        """
        held = memory(fixed, zero)
        if held.total >= limit:
            parts = sorted(((size, name) for name, size in held.parts.items() if size), reverse=True)
            listed = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for size, name in parts)
            raise AdapeftError(
                f"select.memory_per_device = {limit / 2**20:,.0f} MiB: training holds {held.total / 2**20:,.0f} MiB on "
                f"a device before anything is chosen ({listed}). Raise it, lower train.micro_batch_size, or take a "
                f"higher cluster.zero_stage or more workers."
            )
        rests = [limit - moment.total for moment in moments(fixed, zero)]

        def price(has_leaf: bool) -> float:
            costs = bytes_per_element(
                zero, fixed.element_bytes, has_leaf=has_leaf, keeps_base=keeps_base and not has_leaf
            )
            return max(cost * min(rests) / rest for cost, rest in zip(costs, rests, strict=True))

        return cls(limit, min(rests), price(False), price(True))

    def costs(self, groups: Groups) -> np.ndarray:
        """int64 [K]: bytes of each group, rounded up."""
        is_row = groups.is_row[groups.parameter_of]
        return np.ceil(groups.counts * np.where(is_row, self.leaf, self.whole) + np.where(is_row, INDEX, 0)).astype(
            np.int64
        )

    def num_elements(self, groups: Groups) -> int:
        """Elements that there is room for: exactly so of single elements, about so of groups."""
        price = self.leaf + INDEX if groups.granularity == "element" else self.leaf
        return min(math.floor(self.room / price), int(groups.counts.sum()))

    def price_of(self, subset: Subset) -> int:
        """Bytes that a subset of rows, elements and tensors costs."""
        total = 0.0
        for part in subset.parts.values():
            total += part.count * (self.leaf if part.num_indices else self.whole) + INDEX * part.num_indices
        return math.ceil(total)

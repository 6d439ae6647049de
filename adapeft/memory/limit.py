"""A budget in bytes: the memory that a device has left for the subset after everything that does not depend on it."""

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
    """A memory limit per device and the cost of each trained element.

    Attributes:
        limit: maximum bytes that training may use on a device.
        room: bytes of the limit that are available for the subset.
        whole: bytes per element of a tensor that is trained whole.
        leaf: bytes per element of a row, or per single element.
    """

    limit: int
    room: int
    whole: float
    leaf: float

    @classmethod
    def of(cls, limit: int, fixed: Load, zero: Zero, *, keeps_base: bool) -> MemoryLimit:
        """Return the limit of the subset: the bytes of ``limit`` that ``fixed``, the load without it, leaves free.

        A step has two peaks, each with its own remaining bytes and its own cost per element. The costs here are scaled
        to the smaller remainder, and the higher of the two is taken, so any subset within ``room`` fits at both peaks.

        Raises:
            AdapeftError: no memory is left.
        """
        held = memory(fixed, zero)
        if held.total >= limit:
            parts = sorted(((size, name) for name, size in held.parts.items() if size), reverse=True)
            listed = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for size, name in parts)
            raise AdapeftError(
                f"select.memory_per_device = {limit / 2**20:,.0f} MiB: training needs {held.total / 2**20:,.0f} MiB on "
                f"each device even with a budget of 0 ({listed}). Raise it, lower train.micro_batch_size, or use a "
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
        """Return the bytes of each group, rounded up: int64 [K]."""
        is_row = groups.is_row[groups.parameter_of]
        return np.ceil(groups.counts * np.where(is_row, self.leaf, self.whole) + np.where(is_row, INDEX, 0)).astype(
            np.int64
        )

    def num_elements(self, groups: Groups) -> int:
        """Return how many elements fit into ``room``: exact for single elements, approximate for larger groups."""
        price = self.leaf + INDEX if groups.granularity == "element" else self.leaf
        return min(math.floor(self.room / price), int(groups.counts.sum()))

    def price_of(self, subset: Subset) -> int:
        """Return the bytes that a subset of rows, elements and tensors needs."""
        total = 0.0
        for part in subset.parts.values():
            total += part.count * (self.leaf if part.num_indices else self.whole) + INDEX * part.num_indices
        return math.ceil(total)

"""What measuring leaves behind: columns over groups and, for elements, this rank's shards of the same columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.options import Options
from adapeft.measure.shards import Slice


@dataclass(frozen=True)
class ElementShard:
    """Statistics of one rank's elements of one candidate: ``columns[name]`` is float32 [slice.length]."""

    slice: Slice
    columns: dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """Measured columns.

    Attributes:
        groups: the K groups.
        columns: name → float64 [K] (``projections``: float32 [K, M]), equal on every rank; [K, P] over the P points of
            a probe, and elements' columns [slice.length, P].
        elements: this rank's shards when ``groups.granularity`` is ``element``, else empty.
        options: of the matrices besides their rows, where ``select.options`` asks for any.
    """

    groups: Groups
    columns: dict[str, np.ndarray]
    elements: tuple[ElementShard, ...] = field(default=())
    options: Options | None = None

    def without(self, unreached: Sequence[str]) -> Statistics:
        """The statistics of the groups of the other parameters."""
        if not unreached:
            return self
        groups = self.groups.without(unreached)
        names = [info.name for info in groups.parameters]
        kept = np.array([index for index, info in enumerate(self.groups.parameters) if info.name in set(names)])
        of = groups.parameter_of
        rows = self.groups.firsts[kept[of]] + np.arange(groups.num_groups) - groups.firsts[of]
        places = {int(old): new for new, old in enumerate(kept)}
        elements = tuple(
            replace(shard, slice=replace(shard.slice, parameter=places[shard.slice.parameter]))
            for shard in self.elements
            if shard.slice.parameter in places
        )
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Statistics(groups, columns, elements, self.options and self.options.of(places))

"""Measured statistics: columns over groups and, for elements, this rank's shards of the same columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.finite import is_finite
from adapeft.measure.groups import Groups
from adapeft.measure.options import Options
from adapeft.measure.shards.shards import Slice
from adapeft.ranks import Ranks

Value = Callable[[dict[str, Tensor]], Tensor]
"""Function from columns to the value of each group or element, elementwise for any shape."""


@dataclass(frozen=True)
class ElementShard:
    """Statistics of one rank's elements of one candidate.

    Attributes:
        slice: the elements.
        tensors: what is stored: the columns, or the factors from which a subclass computes them.
    """

    slice: Slice
    tensors: dict[str, Tensor]

    is_factored: ClassVar[bool] = False

    @property
    def columns(self) -> dict[str, Tensor]:
        """Columns by name, float32 [slice.length]."""
        return self.tensors

    def sums(self) -> dict[str, Tensor]:
        """Return the sum of each column, float64 []."""
        return {name: column.sum(dtype=torch.float64) for name, column in self.columns.items()}


@dataclass(frozen=True)
class Statistics:
    """Measured columns.

    Attributes:
        groups: the K groups.
        columns: name → float64 [K] (``projections``: float32 [K, M]), equal on every rank. Over the P points of a
            probe they are [K, P], and the columns of elements [slice.length, P].
        elements: this rank's shards if ``groups.granularity`` is ``element``, otherwise empty.
        options: options of the matrices besides their rows, if ``select.options`` lists any.
    """

    groups: Groups
    columns: dict[str, np.ndarray]
    elements: tuple[ElementShard, ...] = field(default=())
    options: Options | None = None

    def values_of(self, parameter: int, value: Value) -> Tensor:
        """Return the values of a candidate's groups or, at ``element`` granularity, of its elements in flat order.

        Args:
            parameter: index of the candidate, all of whose shards must be in this process.
            value: function of the columns that values a group or element.
        """
        if self.groups.granularity == "element":
            mine = [shard for shard in self.elements if shard.slice.parameter == parameter]
            return torch.cat([value(shard.columns) for shard in sorted(mine, key=lambda shard: shard.slice.start)])
        span = self.groups.span(parameter)
        return value({name: torch.from_numpy(column[span].copy()) for name, column in self.columns.items()})

    def without(self, unreached: Sequence[str]) -> Statistics:
        """Return the statistics without the groups of the parameters in ``unreached``."""
        if not unreached:
            return self
        groups = self.groups.without(unreached)
        names = {info.name for info in groups.parameters}
        kept = np.array([index for index, info in enumerate(self.groups.parameters) if info.name in names])
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

    def check_finite(self, owner: str, remedy: str, ranks: Ranks) -> None:
        """Check that all statistics are finite. Collective.

        Args:
            owner: source of the statistics for the message, such as a path.
            remedy: sentence that ends the message.
            ranks: ranks that hold the shards.

        Raises:
            AdapeftError: a statistic is not finite; the message names it and its parameter, the same on all ranks.
        """
        check_columns(self.groups, self.columns, owner, remedy)
        if self.options is not None:
            check_options(self.groups, self.options, owner, remedy)
        # Includes the names of the columns, because a rank may hold no elements.
        names = sorted({*self.columns, *(name for shard in self.elements for name in shard.tensors)})
        found = [
            (shard.slice.parameter, names.index(name))
            for shard in self.elements
            for name, tensor in shard.tensors.items()
            if not is_finite(tensor)
        ]
        everywhere = torch.cat(ranks.all_gather(torch.tensor([*found, (-1, -1)], dtype=torch.int64).flatten()))
        for parameter, number in everywhere.view(-1, 2).tolist():
            if parameter >= 0:
                _refuse(self.groups, names[number], parameter, owner, remedy)


def check_columns(groups: Groups, columns: Mapping[str, np.ndarray], owner: str, remedy: str) -> None:
    """Check the statistics of groups; see ``Statistics.check_finite``."""
    for name, column in columns.items():
        # A slope from a single batch has no standard error; NaN marks it as unknown.
        good = ~np.isinf(column) if name == "slope_error" else np.isfinite(column)
        bad = np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))
        if len(bad):
            _refuse(groups, name, int(groups.parameter_of[bad[0]]), owner, remedy)


def check_options(groups: Groups, options: Options, owner: str, remedy: str) -> None:
    """Check the statistics of options; see ``Statistics.check_finite``."""
    columns = {"slope": options.slopes, "curvature": options.curvatures}
    if options.projections is not None:
        columns["projections"] = options.projections
    for name, column in columns.items():
        bad = np.argwhere(~np.isfinite(column))
        if len(bad):
            _refuse(groups, name, int(options.parameters[bad[0, 0]]), owner, remedy)


def _refuse(groups: Groups, statistic: str, parameter: int, owner: str, remedy: str) -> NoReturn:
    raise AdapeftError(f"{owner}: {statistic!r} of {groups.parameters[parameter].name!r} is not finite. {remedy}")

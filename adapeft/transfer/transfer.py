r"""Choose for one size of a model family from statistics of another size.

The density of a group is its influence per element. A family shares the density of a role (such as the query weights)
as a function of relative depth and, within a tensor, of rank: the share of a tensor's influence that its best tenth
has. So the profile of a role is :math:`c(z, u)`, the mean density of the best fraction u of a tensor at depth z, times
u. Interpolated over z and cut into the rows of the target, it gives a value to every group of the target; with the
costs of the target, the knapsack is solved again. This needs no weights of the target, only its shapes.

If the target's slopes can be measured, they are used, and only the curvature is taken from the source, by role and
depth (see ``with_own_slopes``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapeft.choose.knapsack import knapsack
from adapeft.errors import AdapeftError
from adapeft.measure.exact.elementwise import element_statistics
from adapeft.measure.groups import Groups
from adapeft.measure.shards.shards import Shards
from adapeft.measure.statistics import Statistics, Value
from adapeft.model.structure import ParameterInfo
from adapeft.parts.part import Part
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset

_CUTS = 64
"""Number of pieces of equal size into which a tensor's elements are sorted, the best first."""
_LEAST_MAPPED = 0.5
"""Smallest share of the target's candidate elements with a counterpart; below it the models are not of one family."""

Scores = Callable[[int], Tensor]
"""Function from a candidate to scores of its rows or elements; those of larger score are trained first."""


@dataclass(frozen=True)
class Profiles:
    """Profiles of measured values by role and relative depth.

    Attributes:
        granularity: granularity of the measured groups.
        roles: role → (depths [L], ascending; cumulative densities [L, cuts + 1], from 0 at a tensor's best element).
    """

    granularity: str
    roles: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, statistics: Statistics, value: Value) -> Profiles:
        """Return the profiles of ``value`` of a run's statistics."""
        groups = statistics.groups
        curves: dict[str, list[tuple[float, np.ndarray]]] = {}
        for index, info in enumerate(groups.parameters):
            densities = _densities(statistics, value, index)
            curves.setdefault(profiled_role(info), []).append((info.depth, _cumulated(densities)))
        return cls(groups.granularity, {role: _by_depth(found) for role, found in curves.items()})

    def at(self, info: ParameterInfo) -> np.ndarray | None:
        """Return the cumulative densities [cuts + 1] at the role and depth of a target parameter.

        Returns None if the role is unknown.
        """
        if profiled_role(info) not in self.roles:
            return None
        depths, curves = self.roles[profiled_role(info)]
        return np.array([np.interp(info.depth, depths, column) for column in curves.T])


@dataclass(frozen=True)
class Allotment:
    """The number of trained units of every target candidate, without the choice of these units.

    Attributes:
        numbers: int64 [P], number of trained groups of each candidate (elements at ``element`` granularity).
        value, bound, gap, status: results of the knapsack on the target, in units of the source's loss decrease.
        unmapped: roles of the target that the source does not have.
        mapped: share of the target's candidate elements whose role the source has.
    """

    numbers: np.ndarray
    value: float
    bound: float
    gap: float
    status: str
    unmapped: tuple[str, ...]
    mapped: float


def allot(profiles: Profiles, target: Groups, budget: int) -> Allotment:
    """Divide ``budget`` elements among the candidates of a target.

    Raises:
        AdapeftError: too little of the target has a counterpart in the source.
    """
    curves = [profiles.at(info) for info in target.parameters]
    counts = np.array([info.count for info in target.parameters], dtype=np.int64)
    unmapped, mapped = counterparts(profiles, target)
    if target.granularity == "element":
        numbers, value = _allot_elements(curves, counts, budget)
        return Allotment(numbers, value, value, 0.0, "optimal", unmapped, mapped)
    values = _group_values(curves, target)
    solution = knapsack(values, target.counts, budget)
    numbers = np.array([int(solution.chosen[target.span(index)].sum()) for index in range(len(counts))])
    return Allotment(
        numbers, solution.value, solution.bound, solution.gap, solution.status.name.lower(), unmapped, mapped
    )


def counterparts(profiles: Profiles, target: Groups) -> tuple[tuple[str, ...], float]:
    """Return the roles of the target that the source lacks, and the share of its elements whose role the source has.

    Raises:
        AdapeftError: too little of the target has a counterpart in the source.
    """
    is_known = [profiled_role(info) in profiles.roles for info in target.parameters]
    counts = np.array([info.count for info in target.parameters], dtype=np.int64)
    mapped = float(counts[is_known].sum() / counts.sum())
    unmapped = tuple(
        dict.fromkeys(profiled_role(info) for info, known in zip(target.parameters, is_known, strict=True) if not known)
    )
    if mapped < _LEAST_MAPPED:
        raise AdapeftError(
            f"only {mapped:.0%} of the target's parameters have a counterpart in the measured model; {unmapped[0]!r} "
            f"has none. Measure a model of the target's family."
        )
    return unmapped, mapped


def with_own_slopes(curvatures: Profiles, shards: Shards, target: Groups, slopes: list[Tensor]) -> Statistics:
    """Return statistics of a target with its measured slopes and the source's curvature of each role and depth.

    For short training, influence depends almost only on the slope, which is specific to the model. The curvature is
    similar throughout a tensor, and between the sizes of a family.

    Args:
        curvatures: profiles of the source's curvature.
        shards: shards of the target.
        target: groups of the target.
        slopes: slopes of its elements, float32, aligned with the slices. Those of roles without a counterpart are set
            to 0 in place, so that they are not chosen.
    """
    columns = []
    for piece, slope in zip(shards.slices, slopes, strict=True):
        curve = curvatures.at(target.parameters[piece.parameter])
        if curve is None:
            slope.zero_()
        columns.append(torch.full_like(slope, 0.0 if curve is None else float(curve[-1])))
    return element_statistics(shards, target, {"slope": slopes, "curvature": columns})


def fill(target: Groups, allotment: Allotment, scores: Scores | None) -> Subset:
    """Return the subset that trains the allotted number of each candidate's best rows or elements.

    Args:
        target: groups of the target.
        allotment: allotted numbers.
        scores: scores of rows or elements; None if only whole tensors are chosen.

    Raises:
        AdapeftError: rows or elements must be chosen, but there are no scores.
    """
    parts: dict[str, Part] = {}
    for index, info in enumerate(target.parameters):
        number = int(allotment.numbers[index])
        size = target.num_units(index)
        if not number:
            continue
        if size == 1 or (number == size and target.granularity != "element"):
            parts[info.name] = Whole(info.shape)
            continue
        if scores is None:
            raise AdapeftError(
                f"the choice among the {target.granularity}s of {info.name!r} depends on the target's weights, which "
                f"are missing. Specify a folder that contains them, or set groups: tensor."
            )
        # Stable, so that equal scores give the same subset everywhere.
        best = torch.argsort(scores(index), descending=True, stable=True)[:number].sort().values
        parts[info.name] = target.part(index, best)
    num_chosen = int(allotment.numbers.sum())
    if target.granularity == "role":  # a role is one group, whose tensors have one each of the numbers
        num_chosen = len(np.unique(target.firsts[allotment.numbers > 0]))
    return Subset(parts, target.always_train, target.new).described(
        value=allotment.value,
        bound=allotment.bound,
        gap=allotment.gap,
        status=allotment.status,
        granularity=target.granularity,
        num_total=target.num_total,
        num_groups=int(sum(info.count for info in target.parameters))
        if target.granularity == "element"
        else target.num_groups,
        num_chosen=num_chosen,
        unmapped=list(allotment.unmapped),
        mapped=allotment.mapped,
    )


def profiled_role(info: ParameterInfo) -> str:
    """Return the name without the index in its list of blocks; roles of different lists of a model stay distinct."""
    return info.name if info.layer < 0 else re.sub(r"\d+\.$", "*.", info.name.removesuffix(info.role)) + info.role


def _densities(statistics: Statistics, value: Value, index: int) -> tuple[np.ndarray, int]:
    """Return the values of the candidate's groups or elements, the best first, and the elements of each of them."""
    groups, info = statistics.groups, statistics.groups.parameters[index]
    values = statistics.values_of(index, value)
    if groups.granularity == "role":  # one value for the tensors of all layers, divided in proportion to size
        return values.numpy() / int(groups.counts[groups.firsts[index]]) * info.count, info.count
    return values.sort(descending=True).values.double().numpy(), info.count // len(values)


def _cumulated(densities: tuple[np.ndarray, int]) -> np.ndarray:
    """Return the cumulative sum of values divided by the tensor's size, interpolated at the cuts: [cuts + 1]."""
    values, each = densities
    total = np.concatenate([[0.0], np.cumsum(values)]) / (len(values) * each)
    return np.interp(np.linspace(0, 1, _CUTS + 1), np.linspace(0, 1, len(total)), total)


def _by_depth(found: list[tuple[float, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sort curves by depth, and average those of equal depth (two lists of one role)."""
    depths = np.array(sorted({depth for depth, _ in found}))
    curves = [np.mean([curve for depth, curve in found if depth == one], axis=0) for one in depths]
    return depths, np.stack(curves)


def _group_values(curves: list[np.ndarray | None], target: Groups) -> np.ndarray:
    """Return the predicted values of the target's groups, float64 [K], with a tensor's best row first."""
    values = np.zeros(target.num_groups)
    for index, (info, curve) in enumerate(zip(target.parameters, curves, strict=True)):
        if curve is not None:
            edges = np.linspace(0, 1, int(target.sizes[index]) + 1)
            values[target.span(index)] += info.count * np.diff(np.interp(edges, np.linspace(0, 1, len(curve)), curve))
    return values


def _allot_elements(curves: list[np.ndarray | None], counts: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """Return the number of each candidate's elements among the best ``budget`` ones, and the value of these."""
    edges = np.rint(np.linspace(0, 1, _CUTS + 1)[None] * counts[:, None]).astype(np.int64)
    sizes = np.diff(edges, axis=1)
    density = np.stack([np.zeros(_CUTS) if curve is None else np.diff(curve) * _CUTS for curve in curves])
    order = np.argsort(-density, axis=None, kind="stable")
    order = order[density.flat[order] > 0]
    taken = np.minimum(sizes.flat[order], np.maximum(budget - np.cumsum(sizes.flat[order]) + sizes.flat[order], 0))
    numbers = np.zeros(len(counts), dtype=np.int64)
    np.add.at(numbers, order // _CUTS, taken)
    return numbers, float((density.flat[order] * taken).sum())

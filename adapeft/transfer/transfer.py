r"""Choose for another size of a model's family from what was measured on one.

A group's influence is spread over its elements: its density. What a family shares is the density of a role (the query
weights, say) as a function of relative depth and, inside a tensor, of rank: how much of a tensor's influence its best
tenth holds. So a role's profile is :math:`c(z, u)`, the mean density that the best fraction u of a tensor at depth z
holds, times u. Interpolated over z and cut into the target's own rows it gives every group of the target a value, costs
are the target's, and the knapsack is solved anew. The target needs no weights for that, only its shapes.

Where the target can be run a little, its slopes are its own and the curvature alone is the source's, by role and depth
(see ``with_own_slopes``).
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
from adapeft.measure.elementwise import element_statistics
from adapeft.measure.groups import Groups
from adapeft.measure.shards import Shards
from adapeft.measure.statistics import Statistics, Value
from adapeft.model.structure import ParameterInfo
from adapeft.parts.part import Part
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset

_CUTS = 64
"""Pieces of equal size that a tensor's elements are sorted into, the best first."""
_LEAST_MAPPED = 0.5
"""Share of the target's candidates that has to have a counterpart: below it the families are strangers."""

Scores = Callable[[int], Tensor]
"""Candidate → scores of its rows, or of its elements; the larger are trained first."""


@dataclass(frozen=True)
class Profiles:
    """What was measured, by role and relative depth.

    Attributes:
        granularity: of the groups it was measured on.
        roles: role → (depths [L], ascending; cumulated densities [L, cuts + 1], from 0 at a tensor's best element).
    """

    granularity: str
    roles: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, statistics: Statistics, value: Value) -> Profiles:
        """Profiles of a run's statistics, of what ``value`` makes of them."""
        groups = statistics.groups
        curves: dict[str, list[tuple[float, np.ndarray]]] = {}
        for index, info in enumerate(groups.parameters):
            densities = _densities(statistics, value, index)
            curves.setdefault(profiled_role(info), []).append((info.depth, _cumulated(densities)))
        return cls(groups.granularity, {role: _by_depth(found) for role, found in curves.items()})

    def at(self, info: ParameterInfo) -> np.ndarray | None:
        """Cumulated densities [cuts + 1] at a target parameter's role and depth, None for an unknown role."""
        if profiled_role(info) not in self.roles:
            return None
        depths, curves = self.roles[profiled_role(info)]
        return np.array([np.interp(info.depth, depths, column) for column in curves.T])


@dataclass(frozen=True)
class Allotment:
    """How much of every target candidate is trained, before it is said which of its rows or elements.

    Attributes:
        numbers: int64 [P], groups of each candidate (elements at ``element`` granularity).
        value, bound, gap, status: of the knapsack on the target, in the source's loss decrease.
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
    """Divides ``budget`` elements among the candidates of a target.

    Raises:
        AdapeftError: too little of the target has a counterpart.
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
    """Roles of the target that the source does not have, and the share of its elements whose role it has.

    Raises:
        AdapeftError: too little of the target has a counterpart.
    """
    is_known = [profiled_role(info) in profiles.roles for info in target.parameters]
    counts = np.array([info.count for info in target.parameters], dtype=np.int64)
    mapped = float(counts[is_known].sum() / counts.sum())
    unmapped = tuple(
        dict.fromkeys(profiled_role(info) for info, known in zip(target.parameters, is_known, strict=True) if not known)
    )
    if mapped < _LEAST_MAPPED:
        raise AdapeftError(
            f"only {mapped:.0%} of the target's parameters have a counterpart in what was measured; {unmapped[0]!r} "
            f"has none. Measure a model of the target's own family."
        )
    return unmapped, mapped


def with_own_slopes(curvatures: Profiles, shards: Shards, target: Groups, slopes: list[Tensor]) -> Statistics:
    """Statistics of a target whose slopes were measured, with the source's curvature for its role and depth.

    Where training is short influence is almost the slope alone, and a slope is the model's own; a curvature is much the
    same throughout a tensor, and from one size of a family to the next.

    Args:
        curvatures: profiles of the source's curvature.
        shards: of the target.
        target: its groups.
        slopes: of its elements, float32, aligned with the slices. Those of roles without a counterpart become 0 in
            place, so that they are not chosen.
    """
    columns = []
    for piece, slope in zip(shards.slices, slopes, strict=True):
        curve = curvatures.at(target.parameters[piece.parameter])
        if curve is None:
            slope.zero_()
        columns.append(torch.full_like(slope, 0.0 if curve is None else float(curve[-1])))
    return element_statistics(shards, target, {"slope": slopes, "curvature": columns})


def fill(target: Groups, allotment: Allotment, scores: Scores | None) -> Subset:
    """The subset that trains the allotted number of each candidate's best rows or elements.

    Args:
        target: the groups that were allotted to.
        scores: tells the best; None where whole tensors are chosen.

    Raises:
        AdapeftError: rows or elements have to be told apart and there are no scores.
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
                f"which {target.granularity}s of {info.name!r} to train depends on the target's weights, and there are "
                f"none: give a folder that has them, or choose groups: tensor."
            )
        # Stable, so that equal scores give the same subset everywhere.
        best = torch.argsort(scores(index), descending=True, stable=True)[:number].sort().values
        parts[info.name] = target.part(index, best)
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
        num_chosen=int(allotment.numbers.sum()),
        unmapped=list(allotment.unmapped),
        mapped=allotment.mapped,
    )


def profiled_role(info: ParameterInfo) -> str:
    """The name with the place in the block list left open, so that two lists of a model are not mixed up."""
    return info.name if info.layer < 0 else re.sub(r"\d+\.$", "*.", info.name.removesuffix(info.role)) + info.role


def _densities(statistics: Statistics, value: Value, index: int) -> tuple[np.ndarray, int]:
    """Values of the candidate's groups or elements, the best first, and the elements that each stands for."""
    groups, info = statistics.groups, statistics.groups.parameters[index]
    values = statistics.values_of(index, value)
    if groups.granularity == "role":  # one value for the tensors of all layers, each with its part of it
        return values.numpy() / int(groups.counts[groups.firsts[index]]) * info.count, info.count
    return values.sort(descending=True).values.double().numpy(), info.count // len(values)


def _cumulated(densities: tuple[np.ndarray, int]) -> np.ndarray:
    """Mean over the tensor's elements of the values of its best fraction, at the cuts: [cuts + 1]."""
    values, each = densities
    total = np.concatenate([[0.0], np.cumsum(values)]) / (len(values) * each)
    return np.interp(np.linspace(0, 1, _CUTS + 1), np.linspace(0, 1, len(total)), total)


def _by_depth(found: list[tuple[float, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves in the order of depth; those of one depth (two lists of one role) averaged."""
    depths = np.array(sorted({depth for depth, _ in found}))
    curves = [np.mean([curve for depth, curve in found if depth == one], axis=0) for one in depths]
    return depths, np.stack(curves)


def _group_values(curves: list[np.ndarray | None], target: Groups) -> np.ndarray:
    """float64 [K]: what the target's groups would be worth, a tensor's best row first."""
    values = np.zeros(target.num_groups)
    for index, (info, curve) in enumerate(zip(target.parameters, curves, strict=True)):
        if curve is not None:
            edges = np.linspace(0, 1, int(target.sizes[index]) + 1)
            values[target.span(index)] += info.count * np.diff(np.interp(edges, np.linspace(0, 1, len(curve)), curve))
    return values


def _allot_elements(curves: list[np.ndarray | None], counts: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """Elements of each candidate in the best ``budget`` ones, and what they are worth."""
    edges = np.rint(np.linspace(0, 1, _CUTS + 1)[None] * counts[:, None]).astype(np.int64)
    sizes = np.diff(edges, axis=1)
    density = np.stack([np.zeros(_CUTS) if curve is None else np.diff(curve) * _CUTS for curve in curves])
    order = np.argsort(-density, axis=None, kind="stable")
    order = order[density.flat[order] > 0]
    taken = np.minimum(sizes.flat[order], np.maximum(budget - np.cumsum(sizes.flat[order]) + sizes.flat[order], 0))
    numbers = np.zeros(len(counts), dtype=np.int64)
    np.add.at(numbers, order // _CUTS, taken)
    return numbers, float((density.flat[order] * taken).sum())

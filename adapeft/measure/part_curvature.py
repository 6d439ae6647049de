"""How much a step in the trained part of each tensor changes the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapeft.choose.subset import Part
from adapeft.measure.direction import measure_direction
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.projections import measure_curvatures
from adapeft.measure.shards import Shards, Slice


def measure_part_curvatures(passes: Passes, groups: Groups, parts: Mapping[str, Part]) -> dict[str, float]:
    r"""By tensor, :math:`A_t = d_t^\top F d_t` along Adam's direction, which is zero outside the tensor's part.

    Cross terms within a part are in it: elements that change the predictions alike count more than their sum.

    Args:
        groups: the tensors, each a group.
        parts: of these tensors: whole, rows or elements.
    """
    passes.warm_up(passes.calibration.half_a)
    direction = measure_direction(passes, "adam")
    keep_parts(passes.shards, groups, direction, parts)
    passes.warm_up(passes.calibration.half_b)
    curvatures = measure_curvatures(passes, groups, direction)["curvature"]
    return {info.name: float(curvatures[index]) for index, info in enumerate(groups.parameters)}


def keep_parts(shards: Shards, groups: Groups, direction: Sequence[Tensor], parts: Mapping[str, Part]) -> None:
    """Sets ``direction`` to zero, in place, outside the parts."""
    for piece, along in zip(shards.slices, direction, strict=True):
        part = parts.get(groups.parameters[piece.parameter].name)
        along.mul_(0.0 if part is None else _mask(part, piece).to(along.device))


def _mask(part: Part, piece: Slice) -> Tensor:
    """Which of the slice's elements are in the part, bool [piece.length]."""
    if part.indices is None:
        return torch.ones(piece.length, dtype=torch.bool)
    positions = torch.arange(piece.start, piece.start + piece.length)
    if part.kind == "rows":
        positions = positions // torch.Size(part.shape[part.dim + 1 :]).numel() % part.shape[part.dim]
    return torch.isin(positions, part.indices)

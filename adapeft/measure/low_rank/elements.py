"""Slope and curvature of every element from factors that are seen through windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.elementwise import mean_gradient, shrinkage_of
from adapeft.measure.groups import Groups
from adapeft.measure.low_rank.factored import FactoredShard
from adapeft.measure.low_rank.moments import MatrixMoments, Moments, measure_moments
from adapeft.measure.low_rank.windows import SeenShards, gathered
from adapeft.measure.passes import Passes
from adapeft.measure.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.model.structure import ParameterInfo

_LARGEST = 2**23
"""Elements of one shard at most, so that choosing holds 32 MB of a column at once."""


def measure_elements_of_low_rank(
    passes: Passes, groups: Groups, direction: list[Tensor], *, shrinkage: bool
) -> Statistics:
    """Measure ``slope`` and ``curvature`` of every element over half B in two passes. Collective.

    The elements of a matrix are divided among the ranks by its first dimension, whatever the ZeRO stage.

    Args:
        passes: passes whose windows look along ``direction``.
        direction: result of ``measure_direction_of_low_rank``.
        shrinkage: as in ``measure_elements``, for candidates without a window. Factored moments are means over whole
            rows and columns, whose noise is small.
    """
    shards = passes.shards
    assert isinstance(shards, SeenShards)
    windows, half_b = shards.windows, passes.calibration.half_b
    gradient = mean_gradient(passes, "slope", half_b)
    bases = {candidate: windows.right_of(candidate).clone() for candidate in windows.matrices}
    windows.look_randomly()
    fisher = measure_moments(passes, shards, "curvature", half_b, sampled_labels=True)
    if shrinkage:
        for squares in fisher.squares.values():
            share = shrinkage_of(squares.double().mean(), squares.double().square().mean(), len(half_b))
            squares.mul_(1.0 - share).add_(share * squares.mean(dtype=torch.float64))
    leaves = {candidate: windows.shapes[candidate] for candidate in windows.matrices}
    steps, gradients = (gathered(leaves, shards.slices, pieces, shards) for pieces in (direction, gradient))
    elements: list[ElementShard] = list(_of_the_others(shards, direction, gradient, fisher))
    for candidate, basis in bases.items():
        info, moments = groups.parameters[candidate], fisher.of_matrices[candidate]
        for start, stop in _ranges(info, shards.ranks.rank, shards.ranks.world_size):
            factors = _factors(steps[candidate], gradients[candidate], basis, moments)
            elements.append(_shard(candidate, info, start, stop, factors))
    return Statistics(groups, _sums(groups, elements, shards), tuple(elements))


def _of_the_others(
    shards: SeenShards, direction: list[Tensor], gradient: list[Tensor], fisher: Moments
) -> Iterator[ElementShard]:
    """Yield the shards of the candidates without a window."""
    for piece, along, slope in zip(shards.slices, direction, gradient, strict=True):
        if piece.parameter in fisher.squares:
            curvature = fisher.squares[piece.parameter][piece.start : piece.start + piece.length]
            yield ElementShard(piece, {"slope": slope * along, "curvature": curvature * along * along})


def _ranges(info: ParameterInfo, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """Yield this rank's ranges along the first dimension of a matrix."""
    size, width = info.shape
    start, stop = size * rank // world_size, size * (rank + 1) // world_size
    step = max(1, _LARGEST // width)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _factors(step: Tensor, gradient: Tensor, basis: Tensor, moments: MatrixMoments) -> dict[str, Tensor]:
    total = moments.columns.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "step": step,
        "gradient": gradient,
        "basis": basis,
        "rows": moments.rows / total,
        "columns": moments.columns,
    }


def _shard(candidate: int, info: ParameterInfo, start: int, stop: int, factors: dict[str, Tensor]) -> FactoredShard:
    is_transposed = info.output_dim == 1
    divided = ("basis", "columns") if is_transposed else ("step", "gradient", "rows")
    tensors = {name: tensor[start:stop] if name in divided else tensor for name, tensor in factors.items()}
    width = info.shape[1]
    return FactoredShard(Slice(candidate, start * width, (stop - start) * width), tensors, is_transposed)


def _sums(groups: Groups, elements: list[ElementShard], shards: SeenShards) -> dict[str, np.ndarray]:
    """Return the sums of the columns over the groups, float64 [K]. Collective."""
    sums = torch.zeros(2, groups.num_groups, dtype=torch.float64, device=shards.device)
    for shard in elements:
        columns = shard.columns
        for total, name in zip(sums, ("slope", "curvature"), strict=True):
            touched, partial = groups.sums(shard.slice.parameter, shard.slice.start, columns[name])
            total[touched] += partial
    slope, curvature = shards.ranks.all_reduce(sums).cpu().numpy()
    return {"slope": slope, "curvature": curvature}

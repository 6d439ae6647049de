r"""The direction of low rank: Adam's, with second moments of rows and columns, seen through a window.

The first pass over half A has random windows. It gives :math:`\bar g^\top \Omega` of a matrix with mean gradient
:math:`\bar g` [out, in] and the moments :math:`C` of its columns (``adapeft.measure.low_rank.moments``). The second
pass looks through a basis of m directions in the row space of the gradient (the range finder of Halko, Martinsson and
Tropp 2011) and gives the mean of what is seen and the second moments :math:`R` of its rows.

Groups are measured along :math:`d = R^{-1/2}\, \bar g W W^\top`, with :math:`W = C^{-1/2} Q` for a basis Q of
:math:`C^{-1/2} \bar g^\top \Omega`: the step of a leaf next to inputs scaled by :math:`C^{-1/2}`, under Adam with one
second moment per row. By the singular values :math:`W = P \Sigma N^\top`, it is :math:`d = D P^\top` with
:math:`D = R^{-1/2}\, \bar g P \Sigma^2`. Through the window P, :math:`\langle g, d \rangle = \langle g P, D \rangle`,
so slopes and curvatures measured there are exact.

This is the best of the forms that were tried, in what the choices along it capture on other examples
(tests/benchmarks/results/low-rank.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from adapeft.measure.direction import NOISE
from adapeft.measure.low_rank.moments import (
    Moments,
    basis_of,
    column_scale,
    measure_moments,
    root_mean_square,
    root_mean_square_of_mean,
    strength,
)
from adapeft.measure.low_rank.windows import SeenShards
from adapeft.measure.passes import Passes


def measure_direction_of_low_rank(passes: Passes, kind: str) -> list[Tensor]:
    """Return the direction of groups over half A in two passes, float32, aligned with the slices. Collective.

    A step of the right leaves, through the windows as they are afterwards, is one along it. Candidates without a window
    have the exact direction.

    Args:
        passes: passes whose shards are ``SeenShards``.
        kind: ``adam`` or ``gradient``, as for ``measure_direction``.
    """
    shards = passes.shards
    assert isinstance(shards, SeenShards)
    moments = measure_moments(passes, shards, "ranges", passes.calibration.half_a)
    views, of_model = {}, root_mean_square(moments)
    for candidate, one in moments.of_matrices.items():
        scale = column_scale(one, of_model) if kind == "adam" else torch.ones_like(one.columns)
        ranges = basis_of(one.left / scale[..., None]) * (scale.mean(-1, keepdim=True) / scale)[..., None]
        basis, sizes, _ = torch.linalg.svd(ranges.double(), full_matrices=False)
        window = (basis * (sizes > 0).unsqueeze(-2)).float()
        views[candidate] = _View(window, sizes.square().float().flatten(), scale.shape[-1] ** 0.5)
    return _measure_steps(passes, shards, moments, kind, views)


class _View(NamedTuple):
    """What the second pass sees of a matrix, and how it steps.

    Attributes:
        window: window with orthonormal columns [in, m], or one for each expert.
        weights: weights of its directions [m], Σ², one expert after the other.
        length: length of the step of a row whose gradient is the same in all batches, for Adam.
    """

    window: Tensor
    weights: Tensor
    length: float


def _measure_steps(
    passes: Passes,
    shards: SeenShards,
    moments: Moments,
    kind: str,
    views: Mapping[int, _View],
) -> list[Tensor]:
    """Return the steps of the right leaves, through windows that stay. Collective."""
    windows = shards.windows
    windows.look_along({candidate: view.window for candidate, view in views.items()})
    mean = [torch.zeros(piece.length, device=shards.device) for piece in shards.slices]
    square = [torch.zeros_like(total) for total in mean]
    weight = torch.zeros(1, dtype=torch.float64)
    sums = [*mean, *square, weight]
    for gradients, num_predictions in passes.gradients("direction", passes.calibration.half_a, sums):
        weight += num_predictions
        for index, gradient in enumerate(gradients):
            mean[index].add_(gradient, alpha=num_predictions)
            square[index].addcmul_(gradient, gradient, value=num_predictions)
    for total in (*mean, *square):
        total.div_(weight.item())
    if kind == "gradient":
        scale = root_mean_square_of_mean(shards, moments, mean)
        return [total.div_(scale) for total in mean]
    scale = root_mean_square(moments)
    rows = _row_moments(shards, square, views)
    for piece, total, squares in zip(shards.slices, mean, square, strict=True):
        if piece.parameter not in rows:
            total.div_(squares.sqrt_().add_(NOISE * scale))
            continue
        roots, one, view = rows[piece.parameter].sqrt(), moments.of_matrices[piece.parameter], views[piece.parameter]
        length = view.length * strength(one, scale)
        step = length / (roots + NOISE * roots.square().mean().sqrt() + torch.finfo(roots.dtype).tiny)
        row, direction = windows.place_of(piece, total.device)
        total.mul_(step[row]).mul_(view.weights[direction])
    return mean


def _row_moments(shards: SeenShards, square: list[Tensor], views: Mapping[int, _View]) -> dict[int, Tensor]:
    """Return candidate → weighted second moments [out] of its leaf's rows, equal on every rank. Collective."""
    windows = shards.windows
    sizes = [prod(windows.shapes[candidate][:-1]) for candidate in windows.matrices]
    flat = torch.zeros(sum(sizes), device=shards.device)
    rows = dict(zip(windows.matrices, flat.split(sizes), strict=True))
    for piece, squares in zip(shards.slices, square, strict=True):
        if piece.parameter in rows:
            row, direction = windows.place_of(piece, squares.device)
            rows[piece.parameter].index_add_(0, row, squares * views[piece.parameter].weights[direction])
    shards.ranks.all_reduce(flat)
    return rows

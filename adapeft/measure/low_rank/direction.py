r"""The direction of low rank: Adam's, factored as in Adafactor, and seen through a window on the gradient's row space.

The first pass over half A has random windows and gives :math:`\bar g^\top \Omega` of a matrix with mean gradient
:math:`\bar g` [out, in], and the moments r of its rows and c of its columns (``adapeft.measure.low_rank.moments``).
Adafactor's second moment is :math:`r_i c_j / s`, with :math:`s = \sum_j c_j`, so Adam's direction is :math:`\sqrt s\,
R^{-1/2} \bar g\, C^{-1/2}`. An orthonormal basis
:math:`Q` [in, m] of :math:`C^{-1/2} \bar g^\top \Omega` spans most of its row space (the range finder of Halko,
Martinsson and Tropp 2011). The second pass sees :math:`\bar g\, C^{-1/2} Q` through the window :math:`C^{-1/2} Q`, and
the direction is

.. math:: d = D Q^\top, \qquad D = \sqrt s\, R^{-1/2}\, \bar g\, C^{-1/2} Q \quad [out, m].

Through the window :math:`Q` a step D of the right leaf is the step d of the matrix, and :math:`\langle g, d \rangle =
\langle g Q, D \rangle`, so slopes and curvatures measured there are exact for this direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapeft.measure.direction import NOISE
from adapeft.measure.low_rank.moments import MatrixMoments, Moments, measure_moments
from adapeft.measure.low_rank.windows import SeenShards
from adapeft.measure.passes import Passes

_LEAST = 1e-3
"""Singular values of a range below this share of the largest are noise; the sums over batches are float32."""


def measure_direction_of_low_rank(passes: Passes, kind: str) -> list[Tensor]:
    """Return the direction over half A in two passes, float32, aligned with ``passes.shards.slices``. Collective.

    Afterwards a step of the right leaves is one along it. Candidates without a window have the exact direction.

    Args:
        passes: passes whose shards are ``SeenShards``.
        kind: ``adam`` or ``gradient``, as for ``measure_direction``.
    """
    shards = passes.shards
    assert isinstance(shards, SeenShards)
    moments = measure_moments(passes, shards, "ranges", passes.calibration.half_a)
    scale = _root_mean_square(moments)
    scaling = {
        candidate: _column_scale(one, scale) if kind == "adam" else torch.ones_like(one.columns)
        for candidate, one in moments.of_matrices.items()
    }
    bases = {candidate: _basis(one.left, scaling[candidate]) for candidate, one in moments.of_matrices.items()}
    shards.windows.look_along({candidate: one / scaling[candidate][:, None] for candidate, one in bases.items()})
    mean = [torch.zeros(piece.length, device=shards.device) for piece in shards.slices]
    weight = torch.zeros(1, dtype=torch.float64)
    for gradients, num_predictions in passes.gradients("direction", passes.calibration.half_a, [*mean, weight]):
        weight += num_predictions
        for total, gradient in zip(mean, gradients, strict=True):
            total.add_(gradient, alpha=num_predictions)
    shards.windows.look_along(bases)
    for total in mean:
        total.div_(weight.item())
    if kind == "gradient":
        scale = _root_mean_square_of_mean(shards, moments, mean)
    for piece, total in zip(shards.slices, mean, strict=True):
        found = moments.of_matrices.get(piece.parameter)
        if kind == "gradient":
            total.div_(scale)
        elif found is None:
            square = moments.squares[piece.parameter][piece.start : piece.start + piece.length]
            total.div_(square.sqrt().add_(NOISE * scale))
        else:
            rows = shards.windows.row_of(piece, total.device)
            total.mul_((_row_scale(found, scale) ** -1)[rows])
    return mean


def _column_scale(moments: MatrixMoments, scale: float) -> Tensor:
    r"""Return :math:`\sqrt{c_j}` [in], at least what noise gives."""
    return moments.columns.sqrt().add(NOISE * scale * len(moments.rows) ** 0.5)


def _row_scale(moments: MatrixMoments, scale: float) -> Tensor:
    r"""Return :math:`\sqrt{r_i / s}` [out], at least what noise gives, so that no row steps along rounding."""
    out, width = len(moments.rows), len(moments.columns)
    total = moments.columns.sum().sqrt().add(NOISE * scale * (out * width) ** 0.5)
    return moments.rows.sqrt().add(NOISE * scale * width**0.5) / total


def _root_mean_square(moments: Moments) -> float:
    """Return the root mean square of the gradients of all elements and batches, or 1 if all are zero."""
    matrices, squares = moments.of_matrices.values(), moments.squares.values()
    total = sum(float(one.columns.sum()) for one in matrices) + sum(float(square.sum()) for square in squares)
    return (total / _count(moments)) ** 0.5 if total > 0 else 1.0


def _root_mean_square_of_mean(shards: SeenShards, moments: Moments, mean: list[Tensor]) -> float:
    """Return the root mean square of the mean gradient, or 1 if it is zero. Collective.

    A matrix's is estimated without bias from its left leaf, because the right one shows only some directions.
    """
    squared = torch.zeros(1, dtype=torch.float64, device=shards.device)
    for piece, total in zip(shards.slices, mean, strict=True):
        if piece.parameter in moments.squares:
            squared += total.double().square().sum()
    lefts = [one.left.double().square().sum() for one in moments.of_matrices.values()]
    found = float(shards.ranks.all_reduce(squared)) + float(sum(lefts)) / shards.windows.rank
    return (found / _count(moments)) ** 0.5 if found > 0 else 1.0


def _count(moments: Moments) -> int:
    matrices = moments.of_matrices.values()
    return sum(len(one.rows) * len(one.columns) for one in matrices) + sum(map(len, moments.squares.values()))


def _basis(left: Tensor, scaling: Tensor) -> Tensor:
    """Return an orthonormal basis [in, m] of the columns of ``left`` [in, m], whose rows are divided by ``scaling``.

    Directions that the columns hardly have are zero: rounding would decide where they point.
    """
    basis, sizes, _ = torch.linalg.svd((left / scaling[:, None]).double(), full_matrices=False)
    return (basis * (sizes > _LEAST * sizes[0])).float()

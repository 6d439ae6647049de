r"""The direction of low rank: Adam's, factored as in Adafactor, and seen through a window on the gradient's row space.

For a matrix with gradients :math:`g_t` [out, in] of the batches of half A, the first pass has random windows
:math:`\Omega` and :math:`\Psi` and gives

.. math:: \bar g^\top \Omega, \qquad c_j = \tfrac1m \overline{\|(g_t^\top \Omega)_j\|^2} \approx
          \sum_i \overline{g_{t,ij}^2}, \qquad r_i = \tfrac1m \overline{\|(g_t \Psi)_i\|^2} \approx
          \sum_j \overline{g_{t,ij}^2},

without bias for any m. Adafactor's second moment (Shazeer and Stern 2018, algorithm 2) is :math:`r_i c_j / s`, with
:math:`s = \sum_j c_j`, so Adam's direction is :math:`\sqrt s\, R^{-1/2} \bar g\, C^{-1/2}`. An orthonormal basis
:math:`Q` [in, m] of :math:`C^{-1/2} \bar g^\top \Omega` spans most of its row space (the range finder of Halko,
Martinsson and Tropp 2011). The second pass sees :math:`\bar g\, C^{-1/2} Q` through the window :math:`C^{-1/2} Q`, and
the direction is

.. math:: d = D Q^\top, \qquad D = \sqrt s\, R^{-1/2}\, \bar g\, C^{-1/2} Q \quad [out, m].

Through the window :math:`Q` a step D of the right leaf is the step d of the matrix, and :math:`\langle g, d \rangle =
\langle g Q, D \rangle`, so slopes and curvatures measured there are exact for this direction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from adapeft.measure.direction import NOISE
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
    ranges = _measure_ranges(passes, shards)
    scaling = {
        candidate: one.column_scale(ranges.scale) if kind == "adam" else torch.ones_like(one.columns)
        for candidate, one in ranges.of_matrices.items()
    }
    bases = {candidate: _basis(one.left, scaling[candidate]) for candidate, one in ranges.of_matrices.items()}
    shards.windows.look_along({candidate: one / scaling[candidate][:, None] for candidate, one in bases.items()})
    mean = [torch.zeros(piece.length, device=shards.device) for piece in shards.slices]
    weight = torch.zeros(1, dtype=torch.float64)
    for gradients, num_predictions in passes.gradients("direction", passes.calibration.half_a, [*mean, weight]):
        weight += num_predictions
        for total, gradient in zip(mean, gradients, strict=True):
            total.add_(gradient, alpha=num_predictions)
    shards.windows.look_along(bases)
    for piece, total in zip(shards.slices, mean, strict=True):
        total.div_(weight.item())
        found = ranges.of_matrices.get(piece.parameter)
        if kind == "gradient":
            total.div_(ranges.scale)
        elif found is None:
            square = ranges.squares[piece.parameter][piece.start : piece.start + piece.length]
            total.div_(square.sqrt().add_(NOISE * ranges.scale))
        else:
            rows = shards.windows.row_of(piece, total.device)
            total.mul_((found.row_scale(ranges.scale) ** -1)[rows])
    return mean


@dataclass(frozen=True)
class _Range:
    """The first pass over one matrix.

    Attributes:
        left: mean of gᵀΩ [in, m].
        columns: c [in].
        rows: r [out].
    """

    left: Tensor
    columns: Tensor
    rows: Tensor

    def row_scale(self, scale: float) -> Tensor:
        r"""Return :math:`\sqrt{r_i / s}` [out], at least what noise gives, so that no row steps along rounding."""
        out, width = len(self.rows), len(self.columns)
        total = self.columns.sum().sqrt().add(NOISE * scale * (out * width) ** 0.5)
        return self.rows.sqrt().add(NOISE * scale * width**0.5) / total

    def column_scale(self, scale: float) -> Tensor:
        r"""Return :math:`\sqrt{c_j}` [in], at least what noise gives."""
        return self.columns.sqrt().add(NOISE * scale * len(self.rows) ** 0.5)


class _Ranges:
    """The first pass.

    Attributes:
        of_matrices: candidate → its range.
        squares: candidate without a window → mean squared gradient, flat.
        scale: root mean square of the gradients of all elements and batches.
    """

    def __init__(self, of_matrices: dict[int, _Range], squares: dict[int, Tensor], count: int) -> None:
        self.of_matrices, self.squares = of_matrices, squares
        total = sum(float(one.columns.sum()) for one in of_matrices.values())
        total += sum(float(square.sum()) for square in squares.values())
        self.scale = (total / count) ** 0.5 if total > 0 else 1.0


def _measure_ranges(passes: Passes, shards: SeenShards) -> _Ranges:
    """Measure ranges and moments over half A behind random windows on both sides. Collective."""
    windows = shards.windows
    rank, places = windows.rank, {candidate: place for place, candidate in enumerate(windows.matrices)}
    num_candidates = len(windows.groups.parameters)
    shapes = windows.shapes
    lefts = [torch.zeros(shapes[num_candidates + place], device=shards.device) for place in places.values()]
    columns = [torch.zeros(len(left), device=shards.device) for left in lefts]
    rows = [torch.zeros(shapes[candidate][0], device=shards.device) for candidate in places]
    others = [candidate for candidate in range(num_candidates) if candidate not in places]
    squares = [torch.zeros(prod(shapes[candidate]), device=shards.device) for candidate in others]
    weight = torch.zeros(1, dtype=torch.float64)
    sums = [*lefts, *columns, *rows, *squares, weight]
    everything = replace(passes, shards=shards.all)
    for gradients, num_predictions in everything.gradients("ranges", passes.calibration.half_a, sums):
        weight += num_predictions
        whole = _whole(shards, gradients)
        for candidate, place in places.items():
            left = whole[num_candidates + place]
            lefts[place].add_(left, alpha=num_predictions)
            columns[place].add_(left.square().sum(1), alpha=num_predictions / rank)
            rows[place].add_(whole[candidate].square().sum(1), alpha=num_predictions / rank)
        for square, candidate in zip(squares, others, strict=True):
            square.addcmul_(whole[candidate].flatten(), whole[candidate].flatten(), value=num_predictions)
    for total in (*lefts, *columns, *rows, *squares):
        total.div_(weight.item())
    of_matrices = {candidate: _Range(lefts[place], columns[place], rows[place]) for candidate, place in places.items()}
    count = sum(len(one.rows) * len(one.columns) for one in of_matrices.values()) + sum(map(len, squares))
    return _Ranges(of_matrices, dict(zip(others, squares, strict=True)), count)


def _basis(left: Tensor, scaling: Tensor) -> Tensor:
    """Return an orthonormal basis [in, m] of the columns of ``left`` [in, m], whose rows are divided by ``scaling``.

    Directions that the columns hardly have are zero: rounding would decide where they point.
    """
    basis, sizes, _ = torch.linalg.svd((left / scaling[:, None]).double(), full_matrices=False)
    return (basis * (sizes > _LEAST * sizes[0])).float()


def _whole(shards: SeenShards, gradients: list[Tensor]) -> list[Tensor]:
    """Return the whole gradients of everything in ``windows.names``, the same on every rank. Collective."""
    shapes = shards.windows.shapes
    sizes = [prod(shape) for shape in shapes]
    flat = torch.zeros(sum(sizes), device=shards.device)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    for piece, gradient in zip(shards.all.slices, gradients, strict=True):
        start = starts[piece.parameter] + piece.start
        flat[start : start + piece.length] = gradient
    shards.ranks.all_reduce(flat)
    return [one.view(shape) for one, shape in zip(flat.split(sizes), shapes, strict=True)]

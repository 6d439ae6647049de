r"""Second moments of a matrix's gradients by row and by column, seen through random windows on both sides.

For gradients :math:`g_t` [out, in] and windows :math:`\Omega` [out, m] and :math:`\Psi` [in, m] of standard normal
values,

.. math:: c_j = \tfrac1m \sum_t w_t \|(g_t^\top \Omega)_j\|^2 \approx \sum_{t,i} w_t\, g_{t,ij}^2, \qquad
          r_i = \tfrac1m \sum_t w_t \|(g_t \Psi)_i\|^2 \approx \sum_{t,j} w_t\, g_{t,ij}^2,

without bias for any m. Adafactor's second moment of an element (Shazeer and Stern 2018, algorithm 2) is
:math:`r_i c_j / s`, with :math:`s = \sum_j c_j`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.direction import NOISE
from adapeft.measure.low_rank.windows import SeenShards, gathered
from adapeft.measure.passes import Passes

_LEAST = 1e-3
"""Singular values of a range below this share of the largest are noise; the sums over batches are float32."""


@dataclass(frozen=True)
class MatrixMoments:
    """Sums over the batches of a pass for one matrix, or for each of E fused experts.

    Attributes:
        left: gᵀΩ [in, m] or [E, in, m].
        right: gΨ [out, m] or [E, out, m].
        columns: c [in] or [E, in].
        rows: r [out] or [E, out].
    """

    left: Tensor
    right: Tensor
    columns: Tensor
    rows: Tensor

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.rows.numel() * self.columns.shape[-1]


@dataclass(frozen=True)
class Moments:
    """Moments of all candidates, float32, equal on every rank.

    Attributes:
        of_matrices: candidate with windows → its moments.
        squares: candidate without a window → squared gradients, flat.
    """

    of_matrices: dict[int, MatrixMoments]
    squares: dict[int, Tensor]


def measure_moments(passes: Passes, shards: SeenShards, name: str, batches: Sequence[np.ndarray]) -> Moments:
    """Measure moments over ``batches`` in one pass, behind random windows on both sides. Collective.

    Batches have weights in proportion to their predictions, whose sum is 1.
    """
    sums = MomentSums(shards)
    weight = torch.zeros(1, dtype=torch.float64)
    everything = replace(passes, shards=shards.all)
    for gradients, num_predictions in everything.gradients(name, batches, [*sums.totals, weight]):
        weight += num_predictions
        sums.add(gradients, num_predictions)
    return sums.divided_by(weight.item())


class MomentSums:
    """Moments summed over the batches of a pass.

    Attributes:
        totals: all tensors that hold sums, equal on every rank.

    Args:
        shards: shards whose windows are random, at least while gradients of this pass are computed.
    """

    def __init__(self, shards: SeenShards) -> None:
        self._shards, windows = shards, shards.windows
        self._rank, self._shapes = windows.rank, windows.shapes
        # Candidate → place of its left leaf; the right one is in the candidate's own place.
        first = len(windows.groups.parameters)
        self._lefts = {candidate: first + place for place, candidate in enumerate(windows.matrices)}
        self._matrices = {
            candidate: _zeros(self._shapes[left], self._shapes[candidate], shards.device)
            for candidate, left in self._lefts.items()
        }
        self._squares = {
            candidate: torch.zeros(prod(self._shapes[candidate]), device=shards.device)
            for candidate in range(first)
            if candidate not in self._lefts
        }
        of_matrices = [[one.left, one.right, one.columns, one.rows] for one in self._matrices.values()]
        self.totals = [*chain(*of_matrices), *self._squares.values()]

    def add(self, gradients: Sequence[Tensor], weight: float) -> None:
        """Add what the gradients of a batch, aligned with the slices of everything seen, contribute. Collective."""
        whole = gathered(dict(enumerate(self._shapes)), self._shards.all.slices, gradients, self._shards)
        for candidate, one in self._matrices.items():
            left, right = whole[self._lefts[candidate]], whole[candidate]
            one.left.add_(left, alpha=weight)
            one.right.add_(right, alpha=weight)
            one.columns.add_(left.square().sum(-1), alpha=weight / self._rank)
            one.rows.add_(right.square().sum(-1), alpha=weight / self._rank)
        for candidate, squares in self._squares.items():
            squares.addcmul_(whole[candidate].flatten(), whole[candidate].flatten(), value=weight)

    def divided_by(self, weight: float) -> Moments:
        """Return the moments, which are the sums themselves, divided in place."""
        for total in self.totals:
            total.div_(weight)
        return Moments(self._matrices, self._squares)


def root_mean_square(moments: Moments) -> float:
    """Return the root mean square of the gradients of all elements and batches, or 1 if all are zero."""
    matrices, squares = moments.of_matrices.values(), moments.squares.values()
    total = sum(float(one.columns.sum()) for one in matrices) + sum(float(square.sum()) for square in squares)
    return (total / _count(moments)) ** 0.5 if total > 0 else 1.0


def root_mean_square_of_mean(shards: SeenShards, moments: Moments, mean: Sequence[Tensor]) -> float:
    """Return the root mean square of the mean gradient, or 1 if it is zero. Collective.

    A matrix's is estimated without bias from its left leaf, because a later window shows only some directions.

    Args:
        mean: mean gradient, aligned with ``shards.slices``; only candidates without a window are read.
    """
    squared = torch.zeros(1, dtype=torch.float64, device=shards.device)
    for piece, total in zip(shards.slices, mean, strict=True):
        if piece.parameter in moments.squares:
            squared += total.double().square().sum()
    lefts = [one.left.double().square().sum() for one in moments.of_matrices.values()]
    found = float(shards.ranks.all_reduce(squared)) + float(sum(lefts)) / shards.windows.rank
    return (found / _count(moments)) ** 0.5 if found > 0 else 1.0


def strength(one: MatrixMoments, scale: float) -> float:
    """Return 1, or less for a matrix whose whole gradient may be rounding; see ``NOISE``.

    Args:
        scale: ``root_mean_square`` of the model.
    """
    own = (float(one.columns.sum()) / one.count) ** 0.5
    return own / (own + NOISE * scale)


def column_scale(one: MatrixMoments, scale: float) -> Tensor:
    r"""Return :math:`\sqrt{c_j}` [in], at least what noise gives."""
    return one.columns.sqrt().add(NOISE * scale * one.rows.shape[-1] ** 0.5)


def row_scale(one: MatrixMoments, scale: float) -> Tensor:
    r"""Return :math:`\sqrt{r_i}` [out], at least what noise gives."""
    return one.rows.sqrt().add(NOISE * scale * one.columns.shape[-1] ** 0.5)


def basis_of(seen: Tensor) -> Tensor:
    """Return an orthonormal basis [..., n, m] of the columns of ``seen`` [..., n, m].

    Directions that the columns hardly have are zero: rounding would decide where they point. So are those beyond n.
    """
    basis, sizes, _ = torch.linalg.svd(seen.double(), full_matrices=False)
    basis = (basis * (sizes > _LEAST * sizes[..., :1]).unsqueeze(-2)).float()
    return torch.nn.functional.pad(basis, (0, seen.shape[-1] - basis.shape[-1]))


def _zeros(left: tuple[int, ...], right: tuple[int, ...], device: torch.device) -> MatrixMoments:
    return MatrixMoments(*(torch.zeros(shape, device=device) for shape in (left, right, left[:-1], right[:-1])))


def _count(moments: Moments) -> int:
    return sum(one.count for one in moments.of_matrices.values()) + sum(map(len, moments.squares.values()))

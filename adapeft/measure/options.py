r"""Options of a weight matrix: training it whole, or LoRA of some rank, measured in the same passes as its rows.

All are valued on one scale: the slope b and the curvature A of the step that the option can take. For the whole matrix,
the step is its direction D; LoRA of rank r can take the nearest step of that rank, :math:`D_r = \sum_{i \le r} s_i u_i
v_i^\top` by the singular values of D, so that

.. math:: b_r = \sum_{i \le r} s_i\, u_i^\top \bar G v_i, \qquad
          A_r = \frac{T}{M} \sum_m \Big(\sum_{i \le r} s_i\, u_i^\top \tilde G_m v_i\Big)^2

for the gradients that measuring the rows needs anyway: one projection per singular value, whatever the number of
ranks. The first step of LoRA itself does not predict its value, because its A has no gradient while B = 0 (Xu and Bu
2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.projections import Projector, measure_projections
from adapeft.measure.shards.shards import Shards, Slice
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import Ranks

_OVERSAMPLING = 8
_POWER_ITERATIONS = 4
"""Power iterations of the randomized SVD (Halko, Martinsson and Tropp 2011); Adam's directions have flat spectra."""


@dataclass(frozen=True)
class Options:
    """Alternatives to training rows of a matrix, at most one of which is chosen per matrix; columns over N options.

    Attributes:
        parameters: int64 [N], index of the matrix among the candidates.
        ranks: int64 [N], rank of LoRA; 0 for the whole tensor.
        counts: int64 [N], number of trained elements.
        slopes: float64 [N].
        curvatures: float64 [N].
        projections: float32 [N, M], as those of groups; None in the statistics of earlier versions.
    """

    parameters: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray
    slopes: np.ndarray
    curvatures: np.ndarray
    projections: np.ndarray | None = None

    def of(self, places: Mapping[int, int]) -> Options:
        """Return the options of the candidates in ``places``, a mapping from their old to their new indices."""
        kept = np.isin(self.parameters, list(places))
        return Options(
            np.array([places[int(old)] for old in self.parameters[kept]], dtype=np.int64),
            self.ranks[kept],
            self.counts[kept],
            self.slopes[kept],
            self.curvatures[kept],
            None if self.projections is None else self.projections[kept],
        )


@dataclass(frozen=True)
class _Factors:
    """Singular vectors of a matrix [d0, d1]: ``left`` [d0, R], scaled by the singular values, and ``right`` [d1, R].

    Of a matrix with a window, they are those of the step [out, m] of its right leaf: the window is orthonormal.
    """

    left: Tensor
    right: Tensor


def measure_with_options(
    passes: Passes,
    groups: Groups,
    direction: list[Tensor],
    kinds: Sequence[str],
    ranks: Sequence[int],
    seen: Groups | None = None,
) -> tuple[dict[str, np.ndarray], Options]:
    """Return the columns of ``groups`` (by row) and the options of its matrices. Collective.

    Through windows of rank m, LoRA has at most rank m.

    Args:
        direction: direction of what is measured of each matrix.
        kinds: kinds of options; those other than ``tensor`` and ``lora`` are ignored.
        ranks: ranks of LoRA; each matrix gets those that cost less than training it whole.
        seen: ``groups`` with the shapes of what is measured; None: the candidates themselves.
    """
    shards, steps = passes.shards, seen or groups
    matrices = [i for i, info in enumerate(groups.parameters) if info.is_linear and "lora" in kinds]
    factors = _factors(shards, steps, direction, {i: _most(groups.parameters[i], ranks) for i in matrices})
    triplets = _projector(factors)
    columns = measure_projections(passes, steps, direction, triplets)
    slopes, projections = columns["slope"], columns["projections"]
    found: list[_Found] = []
    place = groups.num_groups
    for index, info in enumerate(groups.parameters):
        if "tensor" in kinds and groups.is_row[index]:
            rows = groups.span(index)
            found.append(_Found(index, 0, info.count, slopes[rows].sum(), _summed(projections[rows])))
        if index in factors:
            width = factors[index].left.shape[1]
            own = slice(place, place + width)
            place += width
            for rank in (rank for rank in ranks if rank <= width):
                slope, projection = slopes[own][:rank].sum(), _summed(projections[own][:rank])
                found.append(_Found(index, rank, _lora_count(info, rank), slope, projection))
    num_batches = projections.shape[1]
    return {name: column[: groups.num_groups] for name, column in columns.items()}, _as_options(found, num_batches)


class _Found(NamedTuple):
    """An option: its matrix, rank, number of elements, slope, and projection float64 [M]."""

    parameter: int
    rank: int
    num_elements: int
    slope: float
    projection: np.ndarray


def _as_options(found: Sequence[_Found], num_batches: int) -> Options:
    projections = np.array([one.projection for one in found]).reshape(len(found), num_batches)
    return Options(
        parameters=np.array([one.parameter for one in found], dtype=np.int64),
        ranks=np.array([one.rank for one in found], dtype=np.int64),
        counts=np.array([one.num_elements for one in found], dtype=np.int64),
        slopes=np.array([one.slope for one in found], dtype=np.float64),
        curvatures=(projections**2).sum(axis=1),
        projections=projections.astype(np.float32),
    )


def _summed(projections: np.ndarray) -> np.ndarray:
    """Return the projection float64 [M] of a step from those of its parts, [n, M]."""
    return projections.sum(axis=0, dtype=np.float64)


def _lora_count(info: ParameterInfo, rank: int) -> int:
    return rank * sum(info.shape)


def _most(info: ParameterInfo, ranks: Sequence[int]) -> int:
    """Return the largest of ``ranks`` that is cheaper than the whole matrix, or 0."""
    return max((rank for rank in ranks if rank < min(info.shape) and _lora_count(info, rank) < info.count), default=0)


def _factors(shards: Shards, groups: Groups, direction: list[Tensor], widths: dict[int, int]) -> dict[int, _Factors]:
    """Return leading singular vectors of the direction of each matrix, the same on every rank. Collective.

    Ranks hold one whole matrix at a time; they take turns in factorizing one and broadcast the result.
    """
    factors = {}
    for turn, (index, width) in enumerate(widths.items()):
        if not width:
            continue
        info = groups.parameters[index]
        width = min(width, *info.shape)
        whole = torch.zeros(info.count, device=shards.device)
        for piece, values in zip(shards.slices, direction, strict=True):
            if piece.parameter == index:
                whole[piece.start : piece.start + piece.length] = values
        shards.ranks.all_reduce(whole)
        left = torch.zeros(info.shape[0], width, device=shards.device)
        right = torch.zeros(info.shape[1], width, device=shards.device)
        if turn % shards.ranks.world_size == shards.ranks.rank:
            u, s, v = _leading(whole.view(info.shape), width)
            left, right = u * s, v
        factors[index] = _Factors(_shared(left, shards.ranks), _shared(right, shards.ranks))
    return factors


def _shared(values: Tensor, ranks: Ranks) -> Tensor:
    """Broadcast a tensor from the rank that has it; the other ranks pass zeros. Collective."""
    return ranks.all_reduce(values.contiguous())


def _leading(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``width`` leading singular triplets: u [d0, width], s [width], v [d1, width]."""
    if width + _OVERSAMPLING >= min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :width], s[:width], vt[:width].t()
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, width + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    return u[:, :width], s[:width], v[:, :width]


def _projector(factors: dict[int, _Factors]) -> Projector:
    r"""Return the projector on every triplet, :math:`s_i\, u_i^\top G v_i`, matrix after matrix."""
    ends = np.cumsum([one.left.shape[1] for one in factors.values()], dtype=np.int64).tolist()
    places = {index: slice(start, end) for index, start, end in zip(factors, [0, *ends], ends, strict=False)}

    def project(piece: Slice, gradient: Tensor) -> tuple[slice, Tensor]:
        if piece.parameter not in factors:
            return slice(0, 0), gradient.new_zeros(0, dtype=torch.float64)
        return places[piece.parameter], _triplets(factors[piece.parameter], piece.start, gradient)

    return Projector(ends[-1] if ends else 0, project)


def _triplets(factors: _Factors, start: int, gradient: Tensor) -> Tensor:
    """Return the contribution of the matrix elements from flat position ``start`` to the triplets' projections."""
    width = len(factors.right)
    first, last = start // width, -(-(start + len(gradient)) // width)
    padded = torch.nn.functional.pad(gradient, (start - first * width, last * width - start - len(gradient)))
    rows = padded.view(last - first, width) @ factors.right
    return (rows * factors.left[first:last]).sum(0, dtype=torch.float64)

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
from math import prod

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.low_rank.windows import SeenShards, gathered
from adapeft.measure.passes import Passes


@dataclass(frozen=True)
class MatrixMoments:
    """Sums over the batches of a pass for one matrix.

    Attributes:
        left: gᵀΩ [in, m].
        columns: c [in].
        rows: r [out].
    """

    left: Tensor
    columns: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of all candidates, float32, equal on every rank.

    Attributes:
        of_matrices: candidate with windows → its moments.
        squares: candidate without a window → squared gradients, flat.
    """

    of_matrices: dict[int, MatrixMoments]
    squares: dict[int, Tensor]


def measure_moments(
    passes: Passes, shards: SeenShards, name: str, batches: Sequence[np.ndarray], *, sampled_labels: bool = False
) -> Moments:
    """Measure moments over ``batches`` in one pass, behind random windows on both sides. Collective.

    Batches have weights in proportion to their predictions, whose sum is 1. At sampled labels it is T, the mean number
    of predictions in a batch, so that the moments are those of the diagonal of the Fisher matrix.
    """
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
    for gradients, num_predictions in everything.gradients(name, batches, sums, sampled_labels=sampled_labels):
        weight += num_predictions
        whole = gathered(dict(enumerate(shapes)), shards.all.slices, gradients, shards)
        for candidate, place in places.items():
            left = whole[num_candidates + place]
            lefts[place].add_(left, alpha=num_predictions)
            columns[place].add_(left.square().sum(1), alpha=num_predictions / rank)
            rows[place].add_(whole[candidate].square().sum(1), alpha=num_predictions / rank)
        for square, candidate in zip(squares, others, strict=True):
            square.addcmul_(whole[candidate].flatten(), whole[candidate].flatten(), value=num_predictions)
    for total in (*lefts, *columns, *rows, *squares):
        total.div_(len(batches) if sampled_labels else weight.item())
    of_matrices = {
        candidate: MatrixMoments(lefts[place], columns[place], rows[place]) for candidate, place in places.items()
    }
    return Moments(of_matrices, dict(zip(others, squares, strict=True)))

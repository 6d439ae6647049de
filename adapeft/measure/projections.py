"""Slope and curvature of every group along the direction, each from projections of gradients in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.batch_slopes import standard_errors
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import Shards, Slice
from adapeft.measure.sums import parts_of


class Projector(NamedTuple):
    """Additional projections of a gradient.

    Attributes:
        size: number of projections, n.
        project: function from a slice and its gradient to a range of 0 … n and its contributions to it, float64.
    """

    size: int
    project: Callable[[Slice, Tensor], tuple[slice, Tensor]]


def measure_projections(
    passes: Passes, groups: Groups, direction: list[Tensor], more: Projector | None = None
) -> dict[str, np.ndarray]:
    r"""Return slopes and curvatures of the groups over half B, in one pass.

    Column ``slope`` is :math:`b_k = \bar g_k^\top d_k`, and ``slope_error`` its standard error. Half B is independent
    of the noise that half A puts into d, so the estimate has no :math:`\|\bar g\|^2` bias.

    Column ``curvature`` is :math:`A_k = T\,\overline{(\tilde g_k^\top d_k)^2}` at sampled labels. With T predictions
    averaged in a global batch this is an unbiased estimate of :math:`d_k^\top F d_k` (F is the Fisher, or Gauss-Newton,
    matrix). It is never negative, and needs no double backward and one all-reduce of K numbers per batch.

    Column ``projections`` is :math:`Z_{km} = \sqrt{T_m/M}\,\tilde g_{mk}^\top d_k`, float32 [K, M] for M batches: the
    cross terms are :math:`A_{jk} \approx \sum_m Z_{jm} Z_{km}`, and the curvature is their diagonal.

    The projections of ``more`` follow those of the groups.
    """
    true, sampled, num_predictions = _project(passes, groups, direction, more)
    scaled = (sampled * np.sqrt(num_predictions / len(num_predictions))[:, None]).T
    return {
        "slope": np.average(true, axis=0, weights=num_predictions),
        "slope_error": standard_errors(true, num_predictions),
        "curvature": (scaled**2).sum(axis=1),
        "projections": scaled.astype(np.float32),
    }


def sum_over_groups(shards: Shards, groups: Groups, values: Iterable[Tensor]) -> np.ndarray:
    """Return sums of sharded ``values`` (one tensor per slice) over each group: float64 [K], equal on every rank."""
    sums = torch.zeros(groups.num_groups, dtype=torch.float64, device=shards.device)
    for piece, value in zip(shards.slices, values, strict=True):
        for start, (part,) in parts_of(piece.start, value):
            touched, own = groups.sums(piece.parameter, start, part)
            sums[touched] += own
    return shards.ranks.all_reduce(sums).cpu().numpy()


def _project(
    passes: Passes, groups: Groups, direction: list[Tensor], more: Projector | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project the M gradients of half B on the direction.

    Returns:
        Projections [M, K] at true labels, those at sampled labels, and the numbers of predictions [M].
    """
    half_b = passes.calibration.half_b
    num_columns = groups.num_groups + (more.size if more else 0)
    tables = torch.zeros(2, len(half_b), num_columns, dtype=torch.float64)
    weights = torch.zeros(len(half_b), dtype=torch.float64)
    done = torch.zeros(1, dtype=torch.int64)
    rows = torch.zeros(2, num_columns, dtype=torch.float64, device=passes.shards.device)

    def project(row: Tensor, place: int, gradient: Tensor, _: int) -> None:
        piece = passes.shards.slices[place]
        for start, (part, along) in parts_of(piece.start, gradient, direction[place]):
            touched, sums = groups.sums(piece.parameter, start, part * along)
            row[touched] += sums
        if more is not None:
            touched, sums = more.project(piece, gradient)
            row[groups.num_groups :][touched] += sums

    true, sampled = (partial(project, row) for row in rows)
    for num_predictions in passes.fold_both("slope and curvature", half_b, [tables, weights, done], true, sampled):
        tables[:, done] = passes.shards.ranks.all_reduce(rows).cpu().unsqueeze(1)
        rows.zero_()
        weights[done] = num_predictions
        done += 1
    return tables[0].numpy(), tables[1].numpy(), weights.numpy()

"""Slope and curvature of every group along the direction, each from projections of gradients in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import Shards, Slice


class Projector(NamedTuple):
    """Additional projections of a gradient.

    Attributes:
        size: number of projections, n.
        project: function from a slice and its gradient to a range of 0 … n and its contributions to it, float64.
    """

    size: int
    project: Callable[[Slice, Tensor], tuple[slice, Tensor]]


def measure_slopes(
    passes: Passes, groups: Groups, direction: list[Tensor], more: Projector | None = None
) -> dict[str, np.ndarray]:
    r"""Return columns ``slope`` :math:`b_k = \bar g_k^\top d_k` over half B and its standard error ``slope_error``.

    Half B is independent of the noise that half A puts into d, so the estimate has no :math:`\|\bar g\|^2` bias. The
    projections of ``more`` follow those of the groups.
    """
    projections, weights = _project(passes, groups, direction, more, sampled_labels=False)
    mean = np.average(projections, axis=0, weights=weights)
    spread = np.average((projections - mean) ** 2, axis=0, weights=weights)
    degrees = len(weights) - 1
    error = np.sqrt(spread / degrees) if degrees > 0 else np.full_like(mean, np.nan)
    return {"slope": mean, "slope_error": error}


def measure_curvatures(
    passes: Passes, groups: Groups, direction: list[Tensor], more: Projector | None = None
) -> dict[str, np.ndarray]:
    r"""Return column ``curvature`` :math:`A_k = T\,\overline{(\tilde g_k^\top d_k)^2}` over half B at sampled labels.

    With T predictions averaged in a global batch this is an unbiased estimate of :math:`d_k^\top F d_k` (F is the
    Fisher, or Gauss-Newton, matrix). It is never negative, and needs no double backward and one all-reduce of K numbers
    per batch.

    Column ``projections`` is :math:`Z_{km} = \sqrt{T_m/M}\,\tilde g_{mk}^\top d_k`, float32 [K, M] for M batches: the
    cross terms are :math:`A_{jk} \approx \sum_m Z_{jm} Z_{km}`, and the curvature is their diagonal.
    """
    projections, num_predictions = _project(passes, groups, direction, more, sampled_labels=True)
    scaled = (projections * np.sqrt(num_predictions / len(num_predictions))[:, None]).T
    return {"curvature": (scaled**2).sum(axis=1), "projections": scaled.astype(np.float32)}


def sum_over_groups(shards: Shards, groups: Groups, values: Iterable[Tensor]) -> np.ndarray:
    """Return sums of sharded ``values`` (one tensor per slice) over each group: float64 [K], equal on every rank."""
    sums = torch.zeros(groups.num_groups, dtype=torch.float64, device=shards.device)
    for piece, value in zip(shards.slices, values, strict=True):
        touched, partial = groups.sums(piece.parameter, piece.start, value)
        sums[touched] += partial
    return shards.ranks.all_reduce(sums).cpu().numpy()


def _project(
    passes: Passes, groups: Groups, direction: list[Tensor], more: Projector | None, *, sampled_labels: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the projections [M, K] of the M gradients of half B on the direction, and their prediction counts [M]."""
    name = "curvature" if sampled_labels else "slope"
    half_b = passes.calibration.half_b
    rows = torch.zeros(len(half_b), groups.num_groups + (more.size if more else 0), dtype=torch.float64)
    weights = torch.zeros(len(half_b), dtype=torch.float64)
    done = torch.zeros(1, dtype=torch.int64)
    sums = [rows, weights, done]
    row = torch.zeros(rows.shape[1], dtype=torch.float64, device=passes.shards.device)
    own, additional = row.split([groups.num_groups, rows.shape[1] - groups.num_groups])

    def project(place: int, gradient: Tensor, _: int) -> None:
        piece = passes.shards.slices[place]
        touched, partial = groups.sums(piece.parameter, piece.start, gradient * direction[place])
        own[touched] += partial
        if more is not None:
            touched, partial = more.project(piece, gradient)
            additional[touched] += partial

    for num_predictions in passes.fold(name, half_b, sums, project, sampled_labels=sampled_labels, is_linear=True):
        rows[done] = passes.shards.ranks.all_reduce(row).cpu()
        row.zero_()
        weights[done] = num_predictions
        done += 1
    return rows.numpy(), weights.numpy()

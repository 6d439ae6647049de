"""Slope and curvature of every element along the direction, kept in the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.batch_slopes import BatchSlopes
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.projections import sum_over_groups
from adapeft.measure.shards.shards import Shards
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.measure.sums import sum_of, sum_of_squares


def measure_elements(passes: Passes, groups: Groups, direction: list[Tensor], *, shrinkage: bool) -> Statistics:
    r"""Measure :math:`b_i = \bar g_i d_i` and :math:`A_i = \hat h_i d_i^2` of every element over half B.

    :math:`\hat h_i = T\,\overline{\tilde g_i^2}` at sampled labels is the diagonal of the Fisher matrix. The columns of
    the groups are sums over each tensor, with the standard error ``slope_error`` of the slope.
    """
    shards, half_b = passes.shards, passes.calibration.half_b
    num_batches = len(half_b)
    slopes = BatchSlopes(shards, groups, direction, num_batches)
    gradient = mean_gradient(passes, "slope", half_b, slopes)
    fisher = [torch.zeros(piece.length, device=shards.device) for piece in shards.slices]

    def add_square(place: int, draw: Tensor, num_predictions: int) -> None:
        fisher[place].addcmul_(draw, draw, value=num_predictions / num_batches)

    for _ in passes.fold("curvature", half_b, fisher, add_square, sampled_labels=True):
        pass
    if shrinkage:
        shrink_to_mean(shards, groups, fisher, num_batches)
    for slope, curvature, along in zip(gradient, fisher, direction, strict=True):
        slope.mul_(along)
        curvature.mul_(along).mul_(along)
    found = element_statistics(shards, groups, {"slope": gradient, "curvature": fisher})
    return replace(found, columns={**found.columns, "slope_error": slopes.errors()})


def element_statistics(shards: Shards, groups: Groups, scores: dict[str, list[Tensor]]) -> Statistics:
    """Return statistics of additive scores: their sums over the groups and, at ``element`` granularity, each score.

    Args:
        scores: column name → float32 pieces, aligned with the slices.
    """
    sums = {name: sum_over_groups(shards, groups, pieces) for name, pieces in scores.items()}
    if groups.granularity != "element":
        return Statistics(groups, sums)
    shards_of = [
        ElementShard(piece, {name: pieces[index] for name, pieces in scores.items()})
        for index, piece in enumerate(shards.slices)
    ]
    return Statistics(groups, sums, tuple(shards_of))


def mean_square_gradient(passes: Passes, name: str) -> list[Tensor]:
    """Return the mean squared gradient over the calibration's batches, float32, aligned with the slices."""
    batches = passes.calibration.batches
    mean = [torch.zeros(piece.length, device=passes.shards.device) for piece in passes.shards.slices]

    def add_square(place: int, gradient: Tensor, _: int) -> None:
        mean[place].addcmul_(gradient, gradient, value=1 / len(batches))

    for _ in passes.fold(name, batches, mean, add_square):
        pass
    return mean


def mean_gradient(
    passes: Passes, name: str, batches: Sequence[np.ndarray], slopes: BatchSlopes | None = None
) -> list[Tensor]:
    """Return the gradient of the mean loss over all predictions of ``batches``, float32, aligned with the slices.

    ``slopes`` gets those of every batch.
    """
    mean = [torch.zeros(piece.length, device=passes.shards.device) for piece in passes.shards.slices]
    weight = torch.zeros(1, dtype=torch.float64)

    def add(place: int, gradient: Tensor, num_predictions: int) -> None:
        mean[place].add_(gradient, alpha=num_predictions)
        if slopes is not None:
            slopes.add(place, gradient)

    sums = [*mean, weight, *(slopes.sums if slopes is not None else [])]
    for num_predictions in passes.fold(name, batches, sums, add, is_linear=True):
        weight += num_predictions
        if slopes is not None:
            slopes.finish(num_predictions)
    return [total.div_(weight.item()) for total in mean]


def shrink_to_mean(shards: Shards, groups: Groups, fisher: list[Tensor], num_draws: int) -> None:
    """Shrink each tensor's curvatures towards their mean, in place; see ``shrinkage_of``."""
    counts = torch.tensor([info.count for info in groups.parameters], dtype=torch.float64)
    first = torch.zeros(len(counts), dtype=torch.float64, device=shards.device)
    second = torch.zeros_like(first)
    for piece, values in zip(shards.slices, fisher, strict=True):
        first[piece.parameter] += sum_of(values)
        second[piece.parameter] += sum_of_squares(values)
    mean, mean_square = shards.ranks.all_reduce(torch.stack([first, second])).cpu() / counts
    weight = shrinkage_of(mean, mean_square, num_draws)
    for piece, values in zip(shards.slices, fisher, strict=True):
        s = float(weight[piece.parameter])
        values.mul_(1.0 - s).add_(s * float(mean[piece.parameter]))


def shrinkage_of(mean: Tensor, mean_square: Tensor, num_draws: int) -> Tensor:
    r"""Return each tensor's s in :math:`h \leftarrow (1 - s)\,h + s\,\bar h`, the best shrinkage of its curvatures h.

    An element's curvature is the mean of ``num_draws`` (M) squared gradients, each approximately χ²₁, so its sampling
    variance is :math:`2h^2/M`. The best linear shrinkage is then
    :math:`s = \frac{2}{M}\overline{h^2} / \mathrm{Var}(\hat h)` (Efron and Morris, 1973), from each tensor's first two
    moments. Without it, slope / curvature favours elements whose few draws happened to be small, so dead coordinates
    win.

    Args:
        mean: mean curvature of each tensor, float64.
        mean_square: mean squared curvature of each tensor, float64.
    """
    variance = (mean_square - mean.square()).clamp(min=0.0)
    noise = 2.0 / (num_draws + 2.0) * mean_square  # E[ĥ²] = (1 + 2/M) E[h²]
    return torch.where(variance > noise, noise / variance.clamp(min=torch.finfo(torch.float64).tiny), 1.0)

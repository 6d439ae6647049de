"""The direction d along which a group would be trained, sharded like the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import Shards
from adapeft.measure.sums import sum_of_squares

NOISE = 1e-5
"""Fraction of the model's root-mean-square gradient below which a coordinate's gradient may be rounding error.

Some gradients are zero except for rounding (softmax is invariant to the bias of attention keys). Adam would take a step
of full length along that noise, and the measurement would depend on the order of sums.
"""


def measure_direction(passes: Passes, kind: str) -> list[Tensor]:
    r"""Return the direction over half A, float32, aligned with ``passes.shards.slices``.

    ``adam``: :math:`d = \bar g / (\sqrt{\overline{g^2}} + \epsilon)`, both means over the global batches, which is
    Adam's step once its moments have settled. ``gradient``: :math:`d = \bar g / \mathrm{rms}(\bar g)`, scaled over the
    whole model. In both, a coordinate moves by about one per unit of reach, so the unit of reach is learning rate times
    steps.
    """
    shards = passes.shards
    mean = [torch.zeros(piece.length, device=shards.device) for piece in shards.slices]
    square = [torch.zeros_like(total) for total in mean] if kind == "adam" else []
    weight = torch.zeros(1, dtype=torch.float64)
    sums = [*mean, *square, weight]

    def add(place: int, gradient: Tensor, num_predictions: int) -> None:
        mean[place].add_(gradient, alpha=num_predictions)
        if square:
            square[place].addcmul_(gradient, gradient, value=num_predictions)

    half_a = passes.calibration.half_a
    for num_predictions in passes.fold("direction", half_a, sums, add, is_linear=kind != "adam"):
        weight += num_predictions
    for total in mean:
        total.div_(weight.item())
    scale = _root_mean_square(shards, mean)
    if kind == "gradient":
        return [total.div_(scale) for total in mean]
    for total, squares in zip(mean, square, strict=True):
        total.div_(squares.div_(weight.item()).sqrt_().add_(NOISE * scale))
    return mean


def _root_mean_square(shards: Shards, pieces: list[Tensor]) -> float:
    """Return the root mean square over all elements of all ranks, or 1 if all are zero."""
    moments = torch.zeros(2, dtype=torch.float64, device=shards.device)
    for piece in pieces:
        moments += torch.stack([sum_of_squares(piece), moments.new_tensor(float(len(piece)))])
    squared, count = shards.ranks.all_reduce(moments).tolist()
    return (squared / count) ** 0.5 if squared > 0 else 1.0

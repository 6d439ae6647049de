"""The direction d a group would be trained along, kept in the same shards as the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from adapeft.measure.passes import Passes

DIRECTIONS = ("adam", "gradient")
_EPSILON = 1e-8  # AdamW's default: coordinates whose gradient is rounding noise get a direction near 0


def measure_direction(passes: Passes, kind: str) -> list[Tensor]:
    r"""Direction from half A, float32, aligned with ``passes.shards.slices``.

    ``adam``: :math:`d = \bar g / (\sqrt{\overline{g^2}} + \epsilon)`, both means over the global batches, which is
    Adam's step once its moments have settled. ``gradient``: :math:`d = \bar g / \mathrm{rms}(\bar g)`, scaled over the
    whole model. Either way a coordinate moves by about one a unit of reach, so that reach has the unit of a learning
    rate times steps.
    """
    shards = passes.shards
    mean = [torch.zeros(piece.length, device=shards.device) for piece in shards.slices]
    square = [torch.zeros_like(total) for total in mean] if kind == "adam" else []
    weight = 0.0
    for gradients, num_predictions in passes.gradients("direction", passes.calibration.half_a):
        weight += num_predictions
        for index, gradient in enumerate(gradients):
            mean[index].add_(gradient, alpha=num_predictions)
            if square:
                square[index].addcmul_(gradient, gradient, value=num_predictions)
    if kind == "adam":
        for first, second in zip(mean, square, strict=True):
            first.div_(weight).div_(second.div_(weight).sqrt_().add_(_EPSILON))
        return mean
    moments = torch.zeros(2, dtype=torch.float64, device=shards.device)
    for total in mean:
        moments += torch.stack([total.double().square().sum(), moments.new_tensor(float(len(total)))])
    squared, count = shards.ranks.all_reduce(moments).tolist()
    scale = (squared / max(count, 1.0)) ** -0.5 if squared > 0 else 0.0
    return [total.mul_(scale) for total in mean]

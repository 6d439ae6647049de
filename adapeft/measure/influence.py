"""Influence: the loss decrease predicted when a group alone is trained within the reach."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adapeft.sections.select import Select


def influence(slope: Tensor, curvature: Tensor, reach: float) -> Tensor:
    r"""Decrease of the quadratic model along d within a reach τ, elementwise for any shape.

    .. math:: v(τ) = \begin{cases} τb - \tfrac12 τ^2 A & τA < b \\ b^2 / (2A) & \text{else} \end{cases}

    0 where the slope is not positive (the two halves of the calibration disagree). τ = ∞ is the AdaPEFT papers'
    influence; there an element of no measured curvature counts 0, for nothing bounds what it would claim.
    """
    if math.isinf(reach):
        limited = torch.zeros_like(slope)
        inside = torch.zeros_like(slope, dtype=torch.bool)
    else:
        limited = reach * slope - 0.5 * reach * (reach * curvature)  # reach**2 may overflow
        inside = reach * curvature < slope
    unlimited = torch.where(curvature > 0, slope.square() / (2 * curvature), 0.0)
    return torch.where(slope > 0, torch.where(inside, limited, unlimited), 0.0)


def reach_of(settings: Select, sum_of_learning_rates: float, num_steps: int) -> float:
    """``select.reach``, or what the training plan makes of ``auto``."""
    return planned_reach(sum_of_learning_rates, num_steps) if settings.reach == "auto" else float(settings.reach)


def planned_reach(sum_of_learning_rates: float, num_steps: int) -> float:
    """Reach of a training plan: Σ learning rates over its steps times a constant that falls with the horizon.

    The prototype's fits were 0.3 at 20 steps and under 0.1 at 60 (MiniLM, SST-2, Adam), so min(1, 6 / steps): training
    turns after about six steps' worth of one direction. Two points make no law; ``select.reach`` overrides it.
    """
    return sum_of_learning_rates * min(1.0, 6.0 / max(num_steps, 1))

"""Influence: the predicted loss decrease if a group alone is trained within the reach."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adapeft.sections.select import Select


def influence(slope: Tensor, curvature: Tensor, reach: float) -> Tensor:
    r"""Return the decrease of the quadratic model along d within a reach τ, elementwise for any shape.

    .. math:: v(τ) = \begin{cases} τb - \tfrac12 τ^2 A & τA < b \\ b^2 / (2A) & \text{else} \end{cases}

    It is 0 where the slope is not positive (the two halves of the calibration disagree). τ = ∞ gives the influence of
    the AdaPEFT papers; there, an element without measured curvature counts as 0, because its decrease would be
    unbounded.
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
    """Return ``select.reach``, or the reach of the training plan if it is ``auto``."""
    return planned_reach(sum_of_learning_rates, num_steps) if settings.reach == "auto" else float(settings.reach)


def planned_reach(sum_of_learning_rates: float, num_steps: int) -> float:
    """Return the reach of a training plan: the sum of its learning rates times a factor that falls with the horizon.

    The prototype's fits were 0.3 at 20 steps and under 0.1 at 60 (MiniLM, SST-2, Adam). Hence min(1, 6 / steps):
    training leaves the initial direction after about six steps. Two points do not establish a law, so ``select.reach``
    can override it.
    """
    return sum_of_learning_rates * min(1.0, 6.0 / max(num_steps, 1))

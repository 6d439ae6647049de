r"""Slope and curvature of every group from losses alone: a parabola through a few displacements along its direction.

Xu and Bu, "Adaptive parameter-efficient fine-tuning via Hessian-informed subset selection", 2025: as
:math:`L(w - η d_k) \approx L - η b_k + \tfrac12 η^2 A_{kk}`, the losses at four displacements of each of K groups, and
at none, give all :math:`b_k` and :math:`A_{kk}` in 4K + 1 forward passes. Each moves one group and puts it back: the
reference for few groups (tensors, roles), where gradients measure any number of them in two passes.
"""

from __future__ import annotations

import numpy as np
import torch

from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.projections import sum_over_groups

SIZES = (-2.0, -1.0, 1.0, 2.0)
"""Displacements in units of h. Both signs, so that third derivatives leave the curvature alone."""

STEP = 0.01
"""Length of a displacement h·d_k, as a part of the median over the groups of the length ‖w_k‖ of their weights.

One length for all groups, because curvature grows with a group's size. On MiniLM (CoLA, 18 roles, Adam's direction, 48
examples of half B): all fits are kept but that of the key biases, to which softmax is blind, and the slopes are 2 % off
those of gradients. At one h of 5e-3 for all, as a learning rate has it, 7 of the 18 fits were bad and slopes 89 % off:
feed-forward matrices leave the quadratic model where biases still drown in the rounding of float32 losses. A group's
own weights are no measure either: biases may be zeros, layer norms are ones.
"""

LEAST_R2 = 0.99
"""Fits that explain less of the losses' variance are discarded; one in a hundred explains as much of mere noise."""


def measure_parabolas(passes: Passes, groups: Groups, direction: list[torch.Tensor]) -> dict[str, np.ndarray]:
    r"""Columns ``slope``, ``curvature`` and ``r2`` over half B, of the least-squares parabola through five losses.

    The weights are as before when this returns. A fit that is not convex (``curvature`` ≤ 0, or too small to
    bend the losses by more than their rounding) or bad (``r2`` below ``LEAST_R2``) is discarded: its slope is 0, and so
    is its influence; the two other columns say why.
    """
    assert groups.granularity in ("tensor", "role"), "a group has whole tensors"
    shards, half_b = passes.shards, passes.calibration.half_b
    base = shards.weights()
    steps = _steps(passes, groups, base, direction)
    losses = np.zeros((groups.num_groups, len(SIZES) + 1))
    losses[:, 0] = passes.loss(half_b)
    for group in passes.steps("parabolas", groups.num_groups, [torch.from_numpy(losses)]):
        members = np.flatnonzero(groups.firsts == group).tolist()
        held = [(index, piece.parameter) for index, piece in enumerate(shards.slices) if piece.parameter in members]
        for column, size in enumerate(SIZES, start=1):
            moved = {parameter: base[index] - size * steps[group] * direction[index] for index, parameter in held}
            shards.write(members, moved)
            losses[group, column] = passes.loss(half_b)
        shards.write(members, {parameter: base[index] for index, parameter in held})
    slope, curvature, r2 = fit_parabolas(losses, steps[:, None] * [0.0, *SIZES])
    # A line fits well too, and would leave a curvature of mere rounding to divide by.
    rounding = torch.finfo(base[0].dtype if base else torch.float32).eps * np.abs(losses[:, 0])
    bend = curvature * (steps * SIZES[-1]) ** 2 / 2
    good = (bend > rounding) & (r2 >= LEAST_R2)
    return {"slope": np.where(good, slope, 0.0), "curvature": curvature, "r2": r2}


def fit_parabolas(losses: np.ndarray, displacements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Least squares of :math:`c - ηb + \tfrac12 η^2 A` for each group.

    Args:
        losses: float64 [K, n].
        displacements: η, float64 [K, n], zeros where a group cannot be displaced.

    Returns:
        b, A and the coefficient of determination R² (all 0 where the losses are equal), each float64 [K].
    """
    scale = np.abs(displacements).max(axis=1)
    scale[scale == 0] = 1.0
    x = displacements / scale[:, None]
    design = np.stack([np.ones_like(x), -x, x**2 / 2], axis=2)
    coefficients = (np.linalg.pinv(design) @ losses[:, :, None])[:, :, 0]
    residual = ((losses - (design @ coefficients[:, :, None])[:, :, 0]) ** 2).sum(axis=1)
    total = ((losses - losses.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    r2 = np.where(total > 0, 1 - residual / np.where(total > 0, total, 1.0), 0.0)
    return coefficients[:, 1] / scale, coefficients[:, 2] / scale**2, r2


def _steps(passes: Passes, groups: Groups, base: list[torch.Tensor], direction: list[torch.Tensor]) -> np.ndarray:
    """h of each group, float64 [K]; 0 where the direction is."""
    weights, along = (
        np.sqrt(sum_over_groups(passes.shards, groups, [piece.double().square() for piece in pieces]))
        for pieces in (base, direction)
    )
    length = STEP * np.median(weights)
    return np.divide(length, along, out=np.zeros_like(along), where=along > 0)

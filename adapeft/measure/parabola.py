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

STEP = 0.05
"""h, as a part of the median over groups of rms(w_k) / rms(d_k).

One h for all groups, as one learning rate moves them all; a group's own weights would say nothing where they are zeros
(new biases) or ones (layer norms). With Adam's direction h moves each weight by a twentieth of a typical one, which is
about what a reach of 3e-3 does: less is lost in the rounding of float32 losses, more leaves the quadratic model.
"""

LEAST_R2 = 0.99
"""Fits that explain less of the losses' variance are discarded; one in a hundred explains as much of mere noise."""


def measure_parabolas(passes: Passes, groups: Groups, direction: list[torch.Tensor]) -> dict[str, np.ndarray]:
    r"""Columns ``slope``, ``curvature`` and ``r2`` over half B, of the least-squares parabola through five losses.

    The weights are as before when this returns. A fit that is not convex (``curvature`` ≤ 0) or bad (``r2`` below
    ``LEAST_R2``) is discarded: its slope is 0, and so is its influence; the two other columns say why.
    """
    assert groups.granularity in ("tensor", "role"), "a group has whole tensors"
    shards, half_b = passes.shards, passes.calibration.half_b
    base = shards.weights()
    step = STEP * _typical_ratio(passes, groups, base, direction)
    losses = np.empty((groups.num_groups, len(SIZES) + 1))
    losses[:, 0] = passes.loss(half_b)
    for group in range(groups.num_groups):
        members = np.flatnonzero(groups.firsts == group).tolist()
        held = [(index, piece.parameter) for index, piece in enumerate(shards.slices) if piece.parameter in members]
        for column, size in enumerate(SIZES, start=1):
            moved = {parameter: base[index] - size * step * direction[index] for index, parameter in held}
            shards.write(members, moved)
            losses[group, column] = passes.loss(half_b)
        shards.write(members, {parameter: base[index] for index, parameter in held})
        passes.progress("parabolas", group + 1, groups.num_groups)
    slope, curvature, r2 = fit_parabolas(losses, step * np.array([0.0, *SIZES]))
    good = (curvature > 0) & (r2 >= LEAST_R2)
    return {"slope": np.where(good, slope, 0.0), "curvature": curvature, "r2": r2}


def fit_parabolas(losses: np.ndarray, displacements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Least squares of :math:`c - ηb + \tfrac12 η^2 A`.

    Args:
        losses: float64 [K, n], at the same displacements for all groups.
        displacements: η, float64 [n].

    Returns:
        b, A and the coefficient of determination R² (0 where the losses are equal), each float64 [K].
    """
    scale = np.abs(displacements).max() or 1.0
    x = displacements / scale
    design = np.stack([np.ones_like(x), -x, x**2 / 2], axis=1)
    coefficients = np.linalg.lstsq(design, losses.T, rcond=None)[0]
    residual = ((losses.T - design @ coefficients) ** 2).sum(axis=0)
    total = ((losses.T - losses.mean(axis=1)) ** 2).sum(axis=0)
    r2 = np.where(total > 0, 1 - residual / np.where(total > 0, total, 1.0), 0.0)
    return coefficients[1] / scale, coefficients[2] / scale**2, r2


def _typical_ratio(passes: Passes, groups: Groups, base: list[torch.Tensor], direction: list[torch.Tensor]) -> float:
    """Median over the groups of rms(w_k) / rms(d_k), of those where neither is zero; 1 where there is none."""
    weights, along = (
        sum_over_groups(passes.shards, groups, [piece.double().square() for piece in pieces])
        for pieces in (base, direction)
    )
    known = (weights > 0) & (along > 0)
    return float(np.median(np.sqrt(weights[known] / along[known]))) if known.any() else 1.0

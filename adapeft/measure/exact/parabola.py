r"""Slope and curvature of every group from losses alone: a parabola through a few displacements along its direction.

Xu and Bu, "Adaptive parameter-efficient fine-tuning via Hessian-informed subset selection", 2025: since
:math:`L(w - η d_k) \approx L - η b_k + \tfrac12 η^2 A_{kk}`, the loss at four displacements of each of K groups and the
loss without displacement give all :math:`b_k` and :math:`A_{kk}` in 4K + 1 forward passes. Each pass displaces one
group and restores it. This is the reference for few groups (tensors, roles); gradients measure any number of groups in
two passes.
"""

from __future__ import annotations

import numpy as np
import torch

from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.projections import sum_over_groups

SIZES = (-2.0, -1.0, 1.0, 2.0)
"""Displacements in units of h. They have both signs, so that third derivatives do not bias the curvature."""

STEP = 0.01
"""Length of a displacement h·d_k, as a fraction of the median of the groups' weight norms ‖w_k‖.

All groups use the same length, because curvature grows with a group's size. On MiniLM (CoLA, 18 roles, Adam's
direction, 48 examples of half B) all fits are kept except that of the key biases, to which softmax is invariant, and
the slopes differ by 2 % from those of gradients. With the same h of 5e-3 for all groups, like a learning rate, 7 of the
18 fits were bad and slopes were off by 89 %: at that h the feed-forward matrices leave the range of the quadratic
model, while the effect of biases is still below the rounding of float32 losses. A group's own weights are no suitable
scale either: biases may be zeros, and layer norms are ones.
"""

LEAST_R2 = 0.99
"""Smallest R² of a fit that is kept; one in a hundred fits to pure noise reaches it."""


def measure_parabolas(passes: Passes, groups: Groups, direction: list[torch.Tensor]) -> dict[str, np.ndarray]:
    r"""Return columns ``slope``, ``curvature`` and ``r2`` of least-squares parabolas through five losses over half B.

    The weights are restored before this returns. A fit that is not convex (``curvature`` ≤ 0, or too small to bend the
    losses by more than their rounding) or bad (``r2`` below ``LEAST_R2``) is discarded: its slope, and hence its
    influence, is set to 0; the other two columns show the reason.
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
    # A straight line also fits well, but its curvature is rounding error, by which influence would divide.
    rounding = torch.finfo(base[0].dtype if base else torch.float32).eps * np.abs(losses[:, 0])
    bend = curvature * (steps * SIZES[-1]) ** 2 / 2
    good = (bend > rounding) & (r2 >= LEAST_R2)
    return {"slope": np.where(good, slope, 0.0), "curvature": curvature, "r2": r2}


def fit_parabolas(losses: np.ndarray, displacements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Fit :math:`c - ηb + \tfrac12 η^2 A` to the losses of each group by least squares.

    Args:
        losses: float64 [K, n].
        displacements: η, float64 [K, n]; zeros for a group that cannot be displaced.

    Returns:
        b, A and the coefficient of determination R² (all 0 if the losses are equal), each float64 [K].
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
    """Return h of each group, float64 [K]; 0 where the direction is zero."""
    weights, along = (
        np.sqrt(sum_over_groups(passes.shards, groups, (piece.double().square() for piece in pieces)))
        for pieces in (base, direction)
    )
    length = STEP * np.median(weights)
    return np.divide(length, along, out=np.zeros_like(along), where=along > 0)

"""Published scores of parameter importance, from one measurement, with one value per group or element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adapeft.measure.direction import measure_direction
from adapeft.measure.exact.elementwise import mean_gradient, measure_elements
from adapeft.measure.groups import Groups
from adapeft.measure.influence import influence
from adapeft.measure.passes import Passes
from adapeft.measure.projections import measure_projections
from adapeft.measure.shards.shards import WholeModel
from adapeft.validate.draw import Draw

Score = list[Tensor]
"""float64 values of a score, one tensor per candidate: [its groups], or [elements] at ``element`` granularity."""

_FINITE_STEP = 1e-3
"""Finite-difference step relative to the norm of the weights; float32 gradients have a rounding error of 1e-7."""


@dataclass(frozen=True)
class Slopes:
    """Slope b and curvature A of every group along one direction, and the joint curvature of every draw."""

    slope: Score
    curvature: Score
    joint_curvature: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Measurements from which predictions are computed.

    Attributes:
        along: name of a direction → slopes and curvatures along it.
        fixed: name of a score that does not depend on the reach → its values.
    """

    along: dict[str, Slopes]
    fixed: dict[str, Score]

    def predictions(self, draws: Sequence[Draw], reach: float) -> dict[str, np.ndarray]:
        r"""Return each estimator's predictions for the draws at a reach τ, float64 [draws].

        ``joint`` is :math:`v(S) = τ\,b_S - \tfrac12 τ^2 \mathbf 1^\top A_{SS} \mathbf 1`, including cross terms.
        ``least joint`` uses the upper bound of the joint curvature, :math:`(\sum_S\sqrt A)^2`, by which single elements
        are chosen. All others are sums over the draw's groups.
        """
        found: dict[str, np.ndarray] = {}
        for name, along in self.along.items():
            of_reach = {
                f"influence ({name})": reach,
                f"influence at τ = ∞ ({name})": float("inf"),
            }
            for title, tau in of_reach.items():
                score = [influence(b, a, tau) for b, a in zip(along.slope, along.curvature, strict=True)]
                found[title] = sums(score, draws)
            slope = sums(along.slope, draws)
            found[f"first order ({name})"] = slope
            most = sums([a.clamp(min=0).sqrt() for a in along.curvature], draws) ** 2
            for title, curvature in {"joint": along.joint_curvature, "least joint": most}.items():
                value = influence(torch.from_numpy(slope), torch.from_numpy(curvature), reach)
                found[f"{title} influence ({name})"] = value.numpy()
        return found | {name: sums(score, draws) for name, score in self.fixed.items()}


def sums(score: Score, draws: Sequence[Draw]) -> np.ndarray:
    """Return the sums of a score over each draw, float64 [draws]."""
    return np.array([sum(float(score[index][units].sum()) for index, units in draw.units.items()) for draw in draws])


def measure_estimators(
    model: nn.Module, passes: Passes, groups: Groups, draws: Sequence[Draw], example_passes: Passes
) -> Measured:
    """Measure all estimators on a whole model.

    Args:
        model: model of ``passes.shards`` (a ``WholeModel``).
        passes: passes over the calibration.
        draws: draws whose joint curvature is measured.
        example_passes: passes over single examples, for the per-example Fisher information.
    """
    assert isinstance(passes.shards, WholeModel)
    parameters = dict(model.named_parameters())
    weights = [parameters[info.name].detach().flatten().double() for info in groups.parameters]
    passes.warm_up(passes.calibration.batches)
    gradient = [piece.double() for piece in mean_gradient(passes, "gradient", passes.calibration.batches)]
    fisher = [torch.zeros_like(piece) for piece in gradient]
    for gradients, _ in example_passes.gradients("fisher", example_passes.calibration.batches, fisher):
        for total, piece in zip(fisher, gradients, strict=True):
            total.add_(piece.double().square())
    curved = _hessian_product(model, passes, groups, gradient)
    elementwise = {
        "squared gradient norm": [piece.square() for piece in gradient],
        "per-example Fisher": fisher,
        "SNIP": [(g * w).abs() for g, w in zip(gradient, weights, strict=True)],
        # GraSP prunes elements of largest -w * Hg (Wang et al. 2020, algorithm 1), so it keeps those of largest w * Hg.
        "GraSP": [w * hg for w, hg in zip(weights, curved, strict=True)],
        "weight magnitude": [w.abs() for w in weights],
        "count": [torch.ones_like(w) for w in weights],
    }
    passes.warm_up(passes.calibration.half_a)
    directions = {name: measure_direction(passes, name) for name in ("adam", "gradient")}
    passes.warm_up(passes.calibration.half_b)
    along = {name: _along(passes, groups, direction, draws) for name, direction in directions.items()}
    return Measured(along, {name: by_unit(groups, score) for name, score in elementwise.items()})


def by_unit(groups: Groups, elements: Score) -> Score:
    """Sum a score of elements over the groups; at ``element`` granularity, return it unchanged."""
    if groups.granularity == "element":
        return elements
    return [groups.sums(index, 0, values)[1] for index, values in enumerate(elements)]


def _along(passes: Passes, groups: Groups, direction: list[Tensor], draws: Sequence[Draw]) -> Slopes:
    joint = _joint_curvatures(passes, groups, direction, draws)
    if groups.granularity == "element":
        # measure_elements multiplies gradients in place, but only reads the direction.
        shards = measure_elements(passes, groups, direction, shrinkage=True).elements
        columns = [{name: column.double() for name, column in shard.columns.items()} for shard in shards]
        return Slopes([column["slope"] for column in columns], [column["curvature"] for column in columns], joint)
    measured = measure_projections(passes, groups, direction)
    cuts = groups.firsts[1:].tolist()
    return Slopes(
        [torch.from_numpy(piece) for piece in np.split(measured["slope"], cuts)],
        [torch.from_numpy(piece) for piece in np.split(measured["curvature"], cuts)],
        joint,
    )


def _joint_curvatures(passes: Passes, groups: Groups, direction: list[Tensor], draws: Sequence[Draw]) -> np.ndarray:
    r"""Return :math:`\mathbf 1^\top A_{SS} \mathbf 1 = T\,\overline{(\sum_S \tilde g_k^\top d_k)^2}` of the draws."""
    total = torch.zeros(len(draws), dtype=torch.float64)
    batches = passes.calibration.half_b
    for gradients, num_predictions in passes.gradients("joint curvature", batches, [total], sampled_labels=True):
        products = by_unit(groups, [(g * d).double() for g, d in zip(gradients, direction, strict=True)])
        total += num_predictions * torch.from_numpy(sums(products, draws)) ** 2
    return total.numpy() / len(batches)


def _hessian_product(model: nn.Module, passes: Passes, groups: Groups, vector: Score) -> Score:
    """Return H·vector over the calibration by a central difference of gradients (Pearlmutter 1994, equation 2)."""
    parameters = dict(model.named_parameters())
    candidates = [parameters[info.name] for info in groups.parameters]
    base = [parameter.detach().clone() for parameter in candidates]
    weight = float(torch.stack([value.double().norm() for value in base]).norm())
    length = float(torch.stack([piece.norm() for piece in vector]).norm())
    step = _FINITE_STEP * weight / length if length > 0 else 0.0
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, value, piece in zip(candidates, base, vector, strict=True):
                parameter.copy_(value + (sign * step * piece).view_as(value).to(value.dtype))
        sides.append(mean_gradient(passes, "GraSP", passes.calibration.batches))
    with torch.no_grad():
        for parameter, value in zip(candidates, base, strict=True):
            parameter.copy_(value)
    if step == 0.0:
        return [torch.zeros_like(piece) for piece in vector]
    return [(up.double() - down.double()) / (2 * step) for up, down in zip(*sides, strict=True)]

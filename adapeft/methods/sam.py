"""SAM: the largest squared gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from adapeft.measure.elementwise import mean_gradient
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.projections import sum_over_groups
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.methods.method import ValuedMethod

if TYPE_CHECKING:
    from adapeft.config import Select


class SAM(ValuedMethod):
    r"""Second-order approximation method with constant curvature: keep the largest :math:`(\nabla L)_i^2`.

    Fu et al., "On the Effectiveness of Parameter-Efficient Fine-Tuning", AAAI 2023, Theorem 3 and its simplification
    H = |λ_max|·I; measured at θ⁰, dropout off, global top-k. Groups of more than one element sum their squares.
    """

    name = "sam"
    family = "second-order"
    summary = "elements of largest squared mean gradient"
    source = "Fu et al. 2023"

    def measure(self, passes: Passes, groups: Groups, settings: Select) -> Statistics:
        gradient = mean_gradient(passes, "gradient", passes.calibration.batches)
        squared = [piece.square_() for piece in gradient]
        sums = sum_over_groups(passes.shards, groups, squared)
        elements = (
            tuple(
                ElementShard(piece, {"squared_gradient": square})
                for piece, square in zip(passes.shards.slices, squared, strict=True)
            )
            if groups.granularity == "element"
            else ()
        )
        return Statistics(groups, {"squared_gradient": sums}, elements)

    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        return columns["squared_gradient"]

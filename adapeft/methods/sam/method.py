"""SAM: the largest squared gradients."""

from __future__ import annotations

from torch import Tensor

from adapeft.measure.exact.elementwise import element_statistics, mean_gradient
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import ValuedMethod
from adapeft.methods.sam.options import SAMOptions


class SAM(ValuedMethod[SAMOptions]):
    r"""Second-order approximation method with constant curvature: the elements of largest :math:`(\nabla L)_i^2`.

    Fu et al., "On the Effectiveness of Parameter-Efficient Fine-Tuning", AAAI 2023, Theorem 3 and its simplification
    H = |λ_max|·I; measured at θ⁰ without dropout, with a global top-k (``select.scope: tensor`` is the top-k per tensor
    of their code). The value of a group is the sum of the squares of its elements.
    """

    options = SAMOptions
    family = "second-order"
    summary = "elements of largest squared mean gradient"
    cost = "one backward pass"
    source = "Fu et al. 2023"

    def measure(self, passes: Passes, groups: Groups, settings: SAMOptions) -> Statistics:
        passes.warm_up(passes.calibration.batches)
        gradient = mean_gradient(passes, "gradient", passes.calibration.batches)
        return element_statistics(passes.shards, groups, {"squared_gradient": [piece.square_() for piece in gradient]})

    def statistics_bytes(self, settings: SAMOptions, num_micro: int) -> int:
        return 4

    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        return columns["squared_gradient"]

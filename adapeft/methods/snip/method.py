"""SNIP: the largest connection sensitivities."""

from __future__ import annotations

from torch import Tensor

from adapeft.measure.exact.elementwise import element_statistics, mean_gradient
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import ValuedMethod
from adapeft.methods.snip.options import SNIPOptions


class SNIP(ValuedMethod[SNIPOptions]):
    r"""The elements of largest connection sensitivity :math:`|\theta_i \, (\nabla L)_i|`.

    Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, equation 5
    without its normalization, which does not change the order. They prune a network at its initialization; here the
    sensitivity is measured at the pretrained weights, and the elements that pruning would keep are trained. The value
    of a group is the sum over its elements.
    """

    options = SNIPOptions
    family = "first-order"
    summary = "elements of largest gradient times pretrained weight"
    cost = "one backward pass"
    source = "Lee et al. 2019"

    def measure(self, passes: Passes, groups: Groups, settings: SNIPOptions) -> Statistics:
        passes.warm_up(passes.calibration.batches)
        gradient = mean_gradient(passes, "gradient", passes.calibration.batches)
        weights = passes.shards.weights()
        sensitivity = [g.mul_(w).abs_() for g, w in zip(gradient, weights, strict=True)]
        return element_statistics(passes.shards, groups, {"sensitivity": sensitivity})

    def statistics_bytes(self, settings: SNIPOptions, num_micro: int) -> int:
        return 8  # the gradient, which becomes the sensitivity, and the weights

    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        return columns["sensitivity"]

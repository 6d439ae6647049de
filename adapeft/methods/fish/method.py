"""FISH: the largest empirical Fisher information, example by example."""

from __future__ import annotations

from torch import Tensor

from adapeft.measure.exact.elementwise import element_statistics, mean_square_gradient
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import ValuedMethod
from adapeft.methods.fish.options import FishOptions


class Fish(ValuedMethod[FishOptions]):
    r"""The elements of largest :math:`\frac1N \sum_n (\nabla_i L_n)^2` over single examples at their true labels.

    Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021, equation 5 (the empirical
    Fisher). They use 1024 examples, and here ``select.calibration`` sets the number. Their budget includes the head,
    whereas ``select.always_train`` is outside the budget here.
    """

    options = FishOptions
    family = "second-order"
    summary = "elements of largest per-example Fisher information"
    cost = "one backward pass per example"
    source = "Sung et al. 2021"
    measures_examples = True

    def measure(self, passes: Passes, groups: Groups, settings: FishOptions) -> Statistics:
        passes.warm_up(passes.calibration.batches)
        fisher = mean_square_gradient(passes, "fisher")
        return element_statistics(passes.shards, groups, {"fisher": fisher})

    def statistics_bytes(self, settings: FishOptions, num_micro: int) -> int:
        return 4

    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        return columns["fisher"]

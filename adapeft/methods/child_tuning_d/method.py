"""ChildTuning-D: a child network by the Fisher information of batches."""

from __future__ import annotations

from torch import Tensor

from adapeft.measure.exact.elementwise import element_statistics, mean_square_gradient
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import ValuedMethod
from adapeft.methods.child_tuning_d.options import ChildTuningDOptions


class ChildTuningD(ValuedMethod[ChildTuningDOptions]):
    """The elements of largest summed squared batch gradient at θ⁰, with a fixed mask.

    Xu et al., "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning", EMNLP 2021,
    section 3.3. They keep 30 % and train embeddings, pooler and head densely. List these in ``select.always_train`` to
    train them outside the budget as they do.
    """

    options = ChildTuningDOptions
    family = "projection"
    summary = "elements of largest squared batch gradients"
    cost = "one backward pass"
    source = "Xu et al. 2021"

    def measure(self, passes: Passes, groups: Groups, settings: ChildTuningDOptions) -> Statistics:
        passes.warm_up(passes.calibration.batches)
        fisher = mean_square_gradient(passes, "fisher")
        return element_statistics(passes.shards, groups, {"fisher": fisher})

    def statistics_bytes(self, settings: ChildTuningDOptions, num_micro: int) -> int:
        return 4 if num_micro == 1 else 8

    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        return columns["fisher"]

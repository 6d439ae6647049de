"""MagPruning: the largest weights."""

from __future__ import annotations

from torch import Tensor

from adapeft.measure.exact.elementwise import element_statistics
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import ValuedMethod
from adapeft.methods.magnitude.options import MagnitudeOptions


class Magnitude(ValuedMethod[MagnitudeOptions]):
    """The elements of largest pretrained magnitude; the value of a group is the sum over its elements.

    "MagPruning" in Fu et al. 2023, after Han et al. 2015 and Lee et al. 2021: trains the elements that pruning would
    keep.
    """

    options = MagnitudeOptions
    family = "rule"
    summary = "elements of largest pretrained weight"
    cost = "nothing"
    source = "Fu et al. 2023"
    measures_loss = False
    scored = "magnitude"

    def measure(self, passes: Passes, groups: Groups, settings: MagnitudeOptions) -> Statistics:
        magnitudes = [self.score(piece) for piece in passes.shards.weights()]
        return element_statistics(passes.shards, groups, {self.scored: magnitudes})

    def score(self, weights: Tensor) -> Tensor:
        return weights.abs()

    def statistics_bytes(self, settings: MagnitudeOptions, num_micro: int) -> int:
        return 8  # the weights, and their magnitudes

    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        return columns["magnitude"]

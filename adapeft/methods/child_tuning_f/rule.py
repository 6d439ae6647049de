"""ChildTuning-F: each step trains a random part of the network."""

from __future__ import annotations

from torch import Tensor

from adapeft.draw import uniform
from adapeft.methods.child_tuning_f.options import ChildTuningFOptions
from adapeft.parts.rule import LeafShard, Rule


class ChildTuningFRule(Rule[ChildTuningFOptions]):
    """Multiplies gradients by Bernoulli(p) / p in each step, elementwise, before the optimizer's moments.

    Xu et al., "Raise a Child in Large Language Model", EMNLP 2021, eq. 5 and 6. As in their code, the moments keep
    masked weights moving. Weight decay pulls towards the pretrained value.
    """

    def edit_gradient(self, shard: LeafShard, gradient: Tensor) -> None:
        drawn = uniform(self.seed, self.step, shard.name, shard.shape, gradient.device).flatten()
        kept = drawn[shard.start : shard.start + len(gradient)] < self.options.probability
        gradient.mul_(kept).div_(self.options.probability)

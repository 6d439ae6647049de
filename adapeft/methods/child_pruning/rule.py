"""ChildPruning: train all candidates, and keep the elements that moved most every few steps."""

from __future__ import annotations

from torch import Tensor

from adapeft.methods.base.rule import ProjectingRule
from adapeft.methods.child_pruning.options import ChildPruningOptions
from adapeft.parts.rule import LeafShard


class ChildPruningRule(ProjectingRule[ChildPruningOptions]):
    """After every ``projection_interval`` full steps, keeps the largest |θ − θ⁰| and resets the others.

    Fu et al. 2023, "ChildPruning". The model is also projected for evaluation and shipping, which does not affect
    training.
    """

    projects_to_evaluate = True

    def projects_after(self, step: int, num_steps: int) -> bool:
        return step % self.options.projection_interval == 0

    def scores(self, shard: LeafShard) -> Tensor:
        return shard.values.abs()

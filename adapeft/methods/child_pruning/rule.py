"""ChildPruning: train everything, and every few steps keep what moved most."""

from __future__ import annotations

from torch import Tensor

from adapeft.methods.base.rule import ProjectingRule
from adapeft.methods.child_pruning.options import ChildPruningOptions
from adapeft.parts.rule import LeafShard


class ChildPruningRule(ProjectingRule[ChildPruningOptions]):
    """Full steps; every ``projection_interval`` of them the largest |θ − θ⁰| are kept, the others reset.

    Fu et al. 2023, "ChildPruning". What is scored and shipped is projected besides, which training does not see.
    """

    projects_to_evaluate = True

    def projects_after(self, step: int, num_steps: int) -> bool:
        return step % self.options.projection_interval == 0

    def scores(self, shard: LeafShard) -> Tensor:
        return shard.values.abs()

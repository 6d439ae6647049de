"""Base classes of the rules of methods, and the description of a rule in a subset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from adapeft.choose.topk import top_k
from adapeft.methods.base.options import RuleOptions
from adapeft.parts.rule import DIFFERENCE, LeafShard, LeafShards, Rule
from adapeft.ranks import Ranks

Options = TypeVar("Options", bound=RuleOptions)


class FixedMask(Rule[None]):
    """The rule without effect, for subsets chosen before training."""

    def __init__(self) -> None:
        super().__init__(None, 0, None)


class ProjectingRule(Rule[Options]):
    """A rule whose projection keeps the ``budget`` differences of largest score and resets the others."""

    budget: int

    @abstractmethod
    def scores(self, shard: LeafShard) -> Tensor:
        """Return the score of each value of a shard, float32; values with a score of 0 or less are never kept."""

    @torch.no_grad()
    def project(self, leaves: LeafShards) -> None:
        shards = leaves.of(DIFFERENCE)
        kept = largest(shards, [self.scores(shard) for shard in shards], self.budget, leaves.ranks)
        for shard, mask in zip(shards, kept, strict=True):
            shard.values.mul_(mask)


def largest(shards: Sequence[LeafShard], scores: Sequence[Tensor], budget: int, ranks: Ranks) -> list[Tensor]:
    """Return bool masks of the exact ``budget`` largest positive scores over all ranks. Collective.

    Ties are broken by position.
    """
    masks = []
    chosen = top_k(scores, [shard.position for shard in shards], budget, ranks.all_reduce)
    for score, picks in zip(scores, chosen, strict=True):
        mask = torch.zeros(len(score), dtype=torch.bool, device=score.device)
        mask[picks] = True
        masks.append(mask)
    return masks


def describe_rule(options: RuleOptions, seed: int, budget: int | None) -> dict[str, Any]:
    """Return the description of a rule in a subset, from which ``rule_of`` creates the same rule."""
    return {"method": options.method, "seed": seed, "budget": budget, "options": options.own()}

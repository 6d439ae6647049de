"""Rules around the steps of any optimizer."""

from __future__ import annotations

import pytest
import torch

from adapeft.parts.rule import DIFFERENCE, LeafShard, LeafShards, Rule
from adapeft.ranks import OneRank
from adapeft.tune.follower import Follower


class Doubling(Rule):
    """Doubles the gradient, so that a second edit shows."""

    def edit_gradient(self, shard, gradient):
        gradient.mul_(2)


class Subclass(torch.optim.SGD):
    """An optimizer whose step calls that of its base, as the engines' does."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Subclass])
def test_a_gradient_is_edited_once_in_every_step(kind):
    torch.optim.SGD([torch.zeros(1)])  # from now on torch runs the hooks of the base's step too
    leaf = torch.nn.Parameter(torch.zeros(3))
    optimizer = kind([leaf], lr=1.0)
    shard = LeafShard(DIFFERENCE, "w", (3,), 0, 0, 0, leaf.detach())
    leaves = LeafShards((shard,), 1, OneRank(), {id(leaf): [(0, shard)]}, lambda: None)
    follower = Follower(Doubling(None, 0, None), leaves, optimizer, num_steps=2)
    for step in (1, 2):
        leaf.grad = torch.ones(3)
        optimizer.step()
        follower.after_step()
        assert leaf.tolist() == [-2.0 * step] * 3

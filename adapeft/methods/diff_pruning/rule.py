"""DiffPruning: differences times learned gates, then a projection and a fixed mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapeft.draw import uniform
from adapeft.methods.base.rule import largest
from adapeft.methods.diff_pruning.options import DiffPruningOptions
from adapeft.parts.rule import DIFFERENCE, LeafShard, LeafShards, Place, Rule

LOW, HIGH = -1.5, 1.5
GATE, TENSOR_GATE = "gate", "tensor_gate"
SHUT = 100.0
"""Absolute logit of a gate whose state is final: for any draw it is exactly 0 or 1, without gradient."""

_SMALLEST_DRAW = 1e-6


def hard_concrete(logits: Tensor, draws: Tensor | float = 0.5) -> Tensor:
    r"""Return stretched and clipped concrete gates in [0, 1] with point masses at both ends.

    .. math:: z = \min(1, \max(0, \sigma(\log u - \log(1-u) + \alpha) (r - l) + l))

    Louizos et al. 2018, with the temperature of 1 and the stretch of Guo et al. 2021.

    Args:
        logits: α.
        draws: u, uniform in (0, 1); at 0.5 the gate is the deterministic one of evaluation.
    """
    noise = torch.logit(draws) if isinstance(draws, Tensor) else math.log(draws / (1 - draws))
    return (torch.sigmoid(logits + noise) * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_open(logits: Tensor) -> Tensor:
    """Return the probability that a gate is not 0: σ(α − log(−l / r))."""
    return torch.sigmoid(logits - math.log(-LOW / HIGH))


class DiffPruningRule(Rule[DiffPruningOptions]):
    """Guo et al., "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021.

    Phase one trains θ⁰ + z ⊙ w with a penalty on the expected number of open gates. If structured, z is the product of
    a gate of the element and a gate of its tensor, each with its own penalty, as in their code. Then the largest
    |z ⊙ w| are kept, and phase two trains only these, with their gates fixed at 1 and the others at 0. The gradient of
    the penalty is added after clipping, so that it does not depend on the gradient norm of the loss.
    """

    budget: int

    def __init__(self, options: DiffPruningOptions, seed: int, budget: int) -> None:
        super().__init__(options, seed, budget)
        self.extra_leaves = (GATE, TENSOR_GATE) if options.structured else (GATE,)
        self.extra_learning_rate = options.gate_learning_rate

    def start(self, leaf: str, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape if leaf == GATE else (1,), self.options.gate_start)

    def effective(self, place: Place, leaves: Sequence[Tensor], training: bool) -> Tensor:
        product = leaves[0]
        for leaf, logits in zip(self.extra_leaves, leaves[1:], strict=True):
            draws: Tensor | float = 0.5
            if training:
                draws = uniform(self.seed, self.step, f"{place.name} {leaf}", logits.shape, logits.device)
                draws = draws.clamp(_SMALLEST_DRAW, 1 - _SMALLEST_DRAW)
            product = product * hard_concrete(logits, draws).to(product.dtype)
        return product

    def edit_gradient(self, shard: LeafShard, gradient: Tensor) -> None:
        if shard.leaf != DIFFERENCE:
            is_open = expected_open(shard.values)
            gradient.add_(is_open * (1 - is_open), alpha=self.options.penalty)

    def projects_after(self, step: int, num_steps: int) -> bool:
        return step == self._projection_step(num_steps)

    def is_ready(self, num_steps: int) -> bool:
        return self.step >= self._projection_step(num_steps)

    @torch.no_grad()
    def project(self, leaves: LeafShards) -> None:
        differences, gates = leaves.of(DIFFERENCE), leaves.of(GATE)
        assert [(s.position, len(s.values)) for s in differences] == [(s.position, len(s.values)) for s in gates]
        for difference, gate in zip(differences, gates, strict=True):
            difference.values.mul_(hard_concrete(gate.values))
        if self.options.structured:
            opened = _open_tensor_gates(leaves).tolist()
            for difference in differences:
                difference.values.mul_(opened[difference.parameter])
        kept = largest(differences, [shard.values.abs() for shard in differences], self.budget, leaves.ranks)
        for difference, gate, mask in zip(differences, gates, kept, strict=True):
            difference.values.mul_(mask)
            gate.values.copy_(torch.where(mask, SHUT, -SHUT))
        for shard in leaves.of(TENSOR_GATE):
            shard.values.fill_(SHUT)

    def _projection_step(self, num_steps: int) -> int:
        return math.ceil(self.options.projection_step * num_steps)


def _open_tensor_gates(leaves: LeafShards) -> Tensor:
    """Return the deterministic gate of every tensor, float32 [parameters]. Collective."""
    opened = torch.zeros(leaves.num_parameters)
    for shard in leaves.of(TENSOR_GATE):
        opened[shard.parameter] = hard_concrete(shard.values)[0].cpu()
    return leaves.ranks.all_reduce(opened)

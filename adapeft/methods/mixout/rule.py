"""Mixout: trained weights are randomly replaced by pretrained ones, as dropout replaces them by zero."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapeft.draw import uniform
from adapeft.methods.base.rule import ProjectingRule
from adapeft.methods.mixout.options import MixoutOptions, MixoutResetOptions
from adapeft.parts.rule import LeafShard, Place, Rule


def mixed(place: Place, difference: Tensor, probability: float, seed: int, step: int) -> Tensor:
    r"""Apply dropout to the difference from the pretrained weight.

    .. math:: [(1-m) \odot W^0 + m \odot W - p W^0] / (1-p) = W^0 + m \odot \Delta / (1-p), \quad m \sim B(1-p)

    Lee et al., "Mixout", ICLR 2020, eq. 5. As in their code, only matrices of linear layers are mixed, with one mask
    over the inputs that all outputs share.
    """
    if place.input_dim is None:
        return difference
    size = difference.shape[place.input_dim]
    kept = uniform(seed, step, place.name, (size,), difference.device) >= probability
    broadcast = [size if dim == place.input_dim else 1 for dim in range(difference.ndim)]
    return difference * (kept / (1 - probability)).to(difference.dtype).view(broadcast)


class MixoutRule(Rule[MixoutOptions]):
    """Lee et al. 2020: all candidates are trained, and evaluated unmixed. Replaces the model's dropout."""

    turns_dropout_off = True

    def effective(self, place: Place, leaves: Sequence[Tensor], training: bool) -> Tensor:
        if not training:
            return leaves[0]
        return mixed(place, leaves[0], self.options.probability, self.seed, self.step)


class MixoutResetRule(ProjectingRule[MixoutResetOptions]):
    """Mixout as in the SAM paper: for evaluation and shipping most weights are reset, so the model is p-sparse.

    Fu et al. 2023. Training resumes from the weights before the reset. The weights that are not reset are drawn once,
    exactly as many as the budget allows.
    """

    turns_dropout_off = True
    projects_to_evaluate = True

    def effective(self, place: Place, leaves: Sequence[Tensor], training: bool) -> Tensor:
        if not training:
            return leaves[0]
        return mixed(place, leaves[0], self.options.probability, self.seed, self.step)

    def scores(self, shard: LeafShard) -> Tensor:
        drawn = uniform(self.seed, 0, f"{shard.name} kept", shard.shape, shard.values.device).flatten()
        return 1 - drawn[shard.start : shard.start + len(shard.values)]  # in (0, 1]: each may be kept

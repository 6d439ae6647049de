"""Mixout: the trained weights are mixed with the pretrained ones, as dropout mixes them with zero."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapeft.draw import uniform
from adapeft.methods.base.rule import ProjectingRule
from adapeft.methods.mixout.options import MixoutOptions, MixoutResetOptions
from adapeft.parts.rule import LeafShard, Place, Rule


def mixed(place: Place, difference: Tensor, probability: float, seed: int, step: int) -> Tensor:
    r"""Dropout of the difference to the pretrained weight.

    .. math:: [(1-m) \odot W^0 + m \odot W - p W^0] / (1-p) = W^0 + m \odot \Delta / (1-p), \quad m \sim B(1-p)

    Lee et al., "Mixout", ICLR 2020, eq. 5. As in their code the matrices of linear layers are mixed, an input at a
    time: one row of the mask serves all outputs.
    """
    if place.input_dim is None:
        return difference
    size = difference.shape[place.input_dim]
    kept = uniform(seed, step, place.name, (size,), difference.device) >= probability
    broadcast = [size if dim == place.input_dim else 1 for dim in range(difference.ndim)]
    return difference * (kept / (1 - probability)).to(difference.dtype).view(broadcast)


class MixoutRule(Rule[MixoutOptions]):
    """Lee et al. 2020: everything is trained, and evaluated unmixed. Takes the place of the model's dropout."""

    turns_dropout_off = True

    def effective(self, place: Place, leaves: Sequence[Tensor], training: bool) -> Tensor:
        if not training:
            return leaves[0]
        return mixed(place, leaves[0], self.options.probability, self.seed, self.step)


class MixoutResetRule(ProjectingRule[MixoutResetOptions]):
    """Mixout as the SAM paper has it: what is scored and shipped has most weights reset, and so is p-sparse.

    Fu et al. 2023. Training goes on from before the reset. The weights that are not reset are drawn once, exactly as
    many as the budget has.
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

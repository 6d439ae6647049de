"""Weights that are trained through leaves of their own: those in a module, or the factors of PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from adapeft.parts.layers.leaves import difference_of, leaves_of
from adapeft.parts.layers.lora import BASE_LAYER, FACTORS, is_adapted, low_rank_of
from adapeft.parts.lora import Lora
from adapeft.parts.part import PartAndValues


class TrainedWeight(NamedTuple):
    """A weight that is trained through separate leaves, by names within its module.

    Attributes:
        weight: name of the base's weight in the model.
        plain: name of the weight in a checkpoint of the base, without the layers that training adds around it.
        leaves: names of its trained leaves.
    """

    weight: str
    plain: str
    leaves: tuple[str, ...]


def trained_weights(module: nn.Module) -> list[TrainedWeight]:
    """Return the weights of ``module`` itself that are trained through separate leaves."""
    if is_adapted(module):
        return [TrainedWeight(f"{BASE_LAYER}.weight", "weight", FACTORS)]
    return [TrainedWeight(name, name, tuple(leaves.values())) for name, leaves in leaves_of(module).items()]


def trained_difference(
    module: nn.Module, trained: TrainedWeight, shape: Sequence[int], leaves: Sequence[Tensor]
) -> PartAndValues:
    """Return what the leaves of a weight add to it, as a part and its values.

    Args:
        module: module that ``trained`` belongs to.
        trained: the weight.
        shape: shape of the whole weight, of which a rank may hold a shard.
        leaves: whole leaves in the order of ``trained.leaves``.
    """
    if is_adapted(module):
        part = Lora(tuple(shape), *low_rank_of(module))
        return part, part.joined([leaf.float() for leaf in leaves])
    return difference_of(module, trained.weight, leaves)

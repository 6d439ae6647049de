"""Dense parts: the difference of every element to the base, trained under the rule of a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapeft.model.divided import shape_of
from adapeft.parts.elements import Elements
from adapeft.parts.layers.functions import DenseLinear, Effective
from adapeft.parts.layers.leaves import Held, LeafPart, add_leaves
from adapeft.parts.part import Attached, Part, PartAndValues, Site
from adapeft.parts.rule import DIFFERENCE, Place, Ruled
from adapeft.parts.whole import Whole


class Dense(Part):
    """All elements of a parameter: leaves of its shape, from which a rule computes the difference to the base."""

    kind = "dense"
    follows_rule = True

    def attach(self, site: Site) -> Attached:
        (module, local_name), rule = site.places[0], site.rule
        linear = all(type(module) in (nn.Linear, Conv1D) and name == "weight" for module, name in site.places)
        input_dim = (0 if isinstance(module, Conv1D) else 1) if linear else None
        parameter = module.get_parameter(local_name)
        shape = shape_of(parameter)
        values = {DIFFERENCE: torch.zeros(shape), **{leaf: rule.start(leaf, shape) for leaf in rule.extra_leaves}}
        leaves = {leaf: nn.Parameter(value.to(parameter.device)) for leaf, value in values.items()}
        ruled = DenseLeaves(Ruled(Place(site.name, input_dim), rule), tuple(leaves))
        added = [add_leaves(module, name, ruled, leaves) for module, name in site.places]
        return Attached({leaf: (module, name) for leaf, name in added[0].items()}, ruled.ruled)

    @torch.no_grad()
    def extract(self, trained: Sequence[Tensor], base: Tensor | None, ruled: Ruled | None) -> PartAndValues | None:
        """Return the elements that moved if the rule has a budget, otherwise the whole tensor."""
        assert ruled is not None
        difference = ruled.effective(trained, training=False)
        shape = tuple(difference.shape)
        if ruled.rule.budget is None:
            return Whole(shape), difference
        moved = difference.flatten().nonzero().squeeze(1)
        return (Elements(shape, moved), difference.flatten()[moved]) if len(moved) else None


@dataclass(frozen=True)
class DenseLeaves(LeafPart):
    """A dense part in a module.

    Attributes:
        ruled: its parameter and rule.
        leaf_names: names of its leaves, the difference first.
    """

    ruled: Ruled
    leaf_names: tuple[str, ...]

    def buffers(self, is_linear: bool) -> dict[str, Tensor]:
        return {}

    def added_to(self, parameter: Tensor, held: Held, training: bool) -> Tensor:
        return parameter + Effective.apply(self.ruled, training, *held.leaves).to(parameter.dtype)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held, training: bool, transposed: bool
    ) -> Tensor:
        """Apply the layer without saving a dense sum for the backward pass."""
        return DenseLinear.apply(x, weight, bias, self.ruled, training, transposed, *held.leaves)

    def merged(self, leaves: Sequence[Tensor]) -> PartAndValues:
        difference = self.ruled.effective(leaves, training=False)
        return Whole(tuple(difference.shape)), difference

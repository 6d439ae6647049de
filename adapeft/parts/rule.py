"""The interface of the rules under which dense parts train, and the shards of leaves that they work on."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from adapeft.ranks import Ranks

DIFFERENCE = "difference"
"""The leaf that every dense part has: θ − θ⁰ before the rule. A rule may add more leaves."""

Options = TypeVar("Options")


class Place(NamedTuple):
    """A parameter's name, and the dimension of its inputs if only linear layers use it, otherwise None."""

    name: str
    input_dim: int | None


@dataclass(frozen=True)
class LeafShard:
    """This process's shard of one leaf: ``leaf.flatten()[start : start + len(values)]``.

    Attributes:
        leaf: ``DIFFERENCE`` or one of the rule's ``extra_leaves``.
        name: name of the parameter.
        shape: shape of the leaf.
        parameter: index of the parameter among the dense parts.
        position: position of the first value among the elements of all dense parts, for leaves of the parameter's
            shape.
        start: position of the first value in the flattened leaf.
        values: values of the shard, float32, 1-D; a view of the tensor that the optimizer steps.
    """

    leaf: str
    name: str
    shape: tuple[int, ...]
    parameter: int
    position: int
    start: int
    values: Tensor


@dataclass(frozen=True)
class LeafShards:
    """This process's shards of all leaves.

    Attributes:
        shards: shards in the order of the parameters; none is empty.
        num_parameters: number of dense parts on all ranks.
        ranks: ranks that share the leaves.
        flats: id of a tensor that the optimizer steps → its shards and their offsets in it.
        publish: function that copies changed values to the model. Collective.
    """

    shards: tuple[LeafShard, ...]
    num_parameters: int
    ranks: Ranks
    flats: dict[int, list[tuple[int, LeafShard]]] = field(repr=False)
    publish: Callable[[], None]

    def of(self, leaf: str) -> list[LeafShard]:
        """Return the shards of one kind of leaf."""
        return [shard for shard in self.shards if shard.leaf == leaf]


class Rule(ABC, Generic[Options]):
    """The way in which a method trains dense leaves, beyond plain training.

    The mask is stored only in the leaves' values, so the leaves and ``step`` are a complete checkpoint.

    Attributes:
        options: options of the method.
        seed: random seed of its draws.
        budget: maximum number of elements that differ from the base in evaluation and in the delta; None: no limit.
        step: number of completed optimizer steps.
        extra_leaves: names of the leaves that a dense part has in addition to its difference.
        extra_learning_rate: learning rate of the extra leaves.
        turns_dropout_off: whether the rule replaces the model's dropout.
    """

    extra_leaves: tuple[str, ...] = ()
    extra_learning_rate: float = 0.0
    turns_dropout_off = False

    def __init__(self, options: Options, seed: int, budget: int | None) -> None:
        self.options = options
        self.seed = seed
        self.budget = budget
        self.step = 0

    def start(self, leaf: str, shape: tuple[int, ...]) -> Tensor:
        """Return the initial value of one of the ``extra_leaves``, for a parameter of this shape."""
        raise NotImplementedError(leaf)

    def effective(self, place: Place, leaves: Sequence[Tensor], training: bool) -> Tensor:
        """Return the difference that the forward pass adds to the pretrained parameter; differentiable.

        Args:
            place: the parameter.
            leaves: its full leaves: the difference, then the ``extra_leaves``.
            training: whether the module that uses it is in training mode.
        """
        return leaves[0]

    def edit_gradient(self, shard: LeafShard, gradient: Tensor) -> None:
        """Change the gradient of a shard in place, after clipping and before the optimizer step."""

    def projects_after(self, step: int, num_steps: int) -> bool:
        """Whether a projection follows step ``step`` of ``num_steps``, counted from 1."""
        return False

    @property
    def projects_to_evaluate(self) -> bool:
        """Whether a projection precedes evaluation and saving of the delta."""
        return False

    def is_ready(self, num_steps: int) -> bool:
        """Whether the training so far may be saved as a delta."""
        return True

    def project(self, leaves: LeafShards) -> None:
        """Project the leaves onto the budget, in place. Collective."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ruled:
    """A parameter that trains under a rule."""

    place: Place
    rule: Rule[Any]

    def effective(self, leaves: Sequence[Tensor], training: bool) -> Tensor:
        """Return the difference that the forward pass adds to the parameter."""
        return self.rule.effective(self.place, leaves, training)

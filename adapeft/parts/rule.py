"""The interface of a rule, which dense parts train under, and the ranges of leaves that it works on."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from adapeft.ranks import Ranks

DIFFERENCE = "difference"
"""The leaf that every dense part has, θ − θ⁰ before the rule; a rule may give a part more leaves."""

Options = TypeVar("Options")


class Place(NamedTuple):
    """A parameter: its name, and the dimension of its inputs where nothing but linear layers use it, else None."""

    name: str
    input_dim: int | None


@dataclass(frozen=True)
class LeafShard:
    """What this process holds of one leaf: ``leaf.flatten()[start : start + len(values)]``.

    Attributes:
        leaf: ``DIFFERENCE`` or one of the rule's ``extra_leaves``.
        name: of the parameter.
        shape: of the leaf.
        parameter: index of the parameter among the dense parts.
        position: of the first value among the elements of all dense parts, for leaves of the parameter's shape.
        start: of the first value in the flattened leaf.
        values: float32, 1-D; a view of what the optimizer steps.
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
        shards: in the order of the parameters; none is empty.
        num_parameters: dense parts, on whatever rank.
        ranks: who holds the rest.
        flats: id of a tensor that the optimizer steps → its shards and where in it they begin.
        publish: brings changed values to the model that computes. Collective.
    """

    shards: tuple[LeafShard, ...]
    num_parameters: int
    ranks: Ranks
    flats: dict[int, list[tuple[int, LeafShard]]] = field(repr=False)
    publish: Callable[[], None]

    def of(self, leaf: str) -> list[LeafShard]:
        """The shards of one kind of leaf."""
        return [shard for shard in self.shards if shard.leaf == leaf]


class Rule(ABC, Generic[Options]):
    """What a method does with dense leaves beyond plain training.

    The mask lives in the leaves' values alone, so that a checkpoint of the leaves and ``step`` is all there is to it.

    Attributes:
        options: the method's numbers.
        seed: of its random draws.
        budget: elements that may differ from the base when the model is scored and shipped; None: all may.
        step: optimizer steps done.
        extra_leaves: names of the leaves that a dense part has beside its difference.
        extra_learning_rate: theirs.
        turns_dropout_off: whether the rule takes the place of the model's dropout.
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
        """Value of one of the ``extra_leaves`` before training, for a parameter of this shape."""
        raise NotImplementedError(leaf)

    def effective(self, place: Place, leaves: Sequence[Tensor], training: bool) -> Tensor:
        """What the forward pass adds to the pretrained parameter; differentiable.

        Args:
            place: the parameter.
            leaves: its leaves, whole: the difference, then the ``extra_leaves``.
            training: whether the module that uses it trains.
        """
        return leaves[0]

    def edit_gradient(self, shard: LeafShard, gradient: Tensor) -> None:
        """Changes the gradient of a shard in place, after clipping and before the optimizer sees it."""

    def projects_after(self, step: int, num_steps: int) -> bool:
        """Whether a projection follows step ``step`` of ``num_steps``, the first being 1."""
        return False

    @property
    def projects_to_evaluate(self) -> bool:
        """Whether evaluating and shipping project first."""
        return False

    def is_ready(self, num_steps: int) -> bool:
        """Whether what is trained so far may be shipped."""
        return True

    def project(self, leaves: LeafShards) -> None:
        """Brings the leaves within the budget, in place. Collective."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ruled:
    """A parameter that trains under a rule."""

    place: Place
    rule: Rule[Any]

    def effective(self, leaves: Sequence[Tensor], training: bool) -> Tensor:
        """What the forward pass adds to the parameter."""
        return self.rule.effective(self.place, leaves, training)

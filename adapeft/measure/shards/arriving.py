"""Gradients that are summed over the ranks and freed one after the other, as the backward pass computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from adapeft.parts.layers import projected
from adapeft.ranks import Ranks

Take = Callable[[int, Tensor], None]
"""Callback that receives the index of a gradient and the gradient, flat and valid only within the call."""

BUCKET = 2**22
"""Number of gradient elements that several ranks sum at once; a larger gradient is summed alone."""

_OF_WINDOWS = tuple(function._backward_cls for function in projected.FUNCTIONS)


def _nothing() -> None:
    pass


class Receiver(NamedTuple):
    """What receives the gradients of a backward pass.

    Attributes:
        take: callback for each gradient.
        prepare: function that is called before the backward pass.
    """

    take: Take
    prepare: Callable[[], None] = _nothing


class Backward:
    """Backward passes whose gradients are handed on instead of being kept in ``grad``.

    At any time one gradient is alive, and a bucket of small ones if several ranks share the pass.

    Args:
        parameters: parameters whose gradients are handed on.
        sizes: their numbers of elements.
        ranks: ranks that share the pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sizes: Sequence[int], ranks: Ranks) -> None:
        self._parameters, self._sizes, self._ranks = parameters, sizes, ranks
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._dtype = torch.float32
        for parameter in parameters:
            self._dtype = torch.promote_types(self._dtype, parameter.dtype)

    def run(self, loss: Tensor, take: Take, *, keeps_graph: bool = False) -> set[int]:
        """Compute gradients of the sum of ``loss`` over the ranks; return which parameters got one on this rank.

        Those that require no gradient are left out. ``take`` is called for each parameter that got a gradient on any
        rank, on all ranks in the same order; gradients are float32, or float64 if the model is. Collective.

        Args:
            loss: this rank's loss.
            take: callback for each gradient.
            keeps_graph: whether another backward pass through the same graph follows.
        """
        bucket = _Bucket(self._ranks, min(BUCKET, sum(self._sizes)), self._dtype, take)
        everywhere, somewhere = self._in_graphs(loss)
        late: dict[int, Tensor] = {}
        computed: set[int] = set()

        def arrive(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            place = self._places[id(parameter)]
            computed.add(place)
            if place in everywhere:
                bucket.add(place, gradient.flatten())
            else:
                late[place] = gradient.flatten()

        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(arrive) for parameter in trained]
        try:
            loss.backward(retain_graph=keeps_graph)
        finally:
            for handle in handles:
                handle.remove()
        for place in somewhere:
            gradient = late.pop(place, None)
            bucket.add(place, loss.new_zeros(self._sizes[place]) if gradient is None else gradient)
        bucket.empty()
        return computed

    def in_graph(self, loss: Tensor) -> tuple[set[int], bool]:
        """Return which parameters ``loss`` depends on, and whether its graph may hide more of them.

        A function that is written in Python may run a graph of its own in its backward pass, as checkpoints that are
        reentrant do.
        """
        leaves, hides = _leaves(loss)
        return {self._places[found] for found in leaves if found in self._places}, hides

    def _in_graphs(self, loss: Tensor) -> tuple[set[int], list[int]]:
        """Return the parameters in the graphs of all ranks, and those only in the graphs of some.

        The ranks must sum the same gradients in the same order, but a rank may have no token for one of the experts.
        """
        if self._ranks.world_size == 1:
            return set(range(len(self._parameters))), []
        counts = torch.zeros(len(self._parameters), dtype=torch.int64)
        counts[[*self.in_graph(loss)[0]]] = 1
        ranks = self._ranks.all_reduce(counts).tolist()
        everywhere = {place for place, count in enumerate(ranks) if count == self._ranks.world_size}
        return everywhere, [place for place, count in enumerate(ranks) if count and place not in everywhere]


class _Bucket:
    """Gradients that the ranks sum together: one sum for each of many small ones would mostly wait."""

    def __init__(self, ranks: Ranks, size: int, dtype: torch.dtype, take: Take) -> None:
        self._ranks, self._size, self._dtype, self._take = ranks, size, dtype, take
        self._held: list[tuple[int, Tensor]] = []
        self._values: Tensor | None = None
        self._used = 0

    def add(self, place: int, gradient: Tensor) -> None:
        if self._ranks.world_size == 1:
            self._take(place, gradient.to(self._dtype))
            return
        if self._used + len(gradient) > self._size:
            self.empty()
        if len(gradient) > self._size:
            self._take(place, self._ranks.all_reduce(gradient.to(self._dtype)))
            return
        if self._values is None:
            self._values = torch.empty(self._size, dtype=self._dtype, device=gradient.device)
        own = self._values[self._used : self._used + len(gradient)]
        self._held.append((place, own.copy_(gradient)))
        self._used += len(gradient)

    def empty(self) -> None:
        if self._values is None or not self._used:
            return
        self._ranks.all_reduce(self._values[: self._used])
        for place, gradient in self._held:
            self._take(place, gradient)
        self._held, self._used = [], 0


def _leaves(loss: Tensor) -> tuple[set[int], bool]:
    """Return the ids of the parameters in the graph of ``loss``, and whether others' Python functions are in it."""
    found, seen, ahead = set(), set(), [loss.grad_fn]
    hides = False
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        hides |= isinstance(node, BackwardCFunction) and not isinstance(node, _OF_WINDOWS)
        ahead += [following for following, _ in node.next_functions]
    return found, hides

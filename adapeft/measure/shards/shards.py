"""Interface through which measuring accesses parameters: one rank's slice of each, and the group of ranks.

``WholeModel`` implements it for ranks that hold the whole model, ``cluster.zero.shards.DividedModel`` for ZeRO-3.
Nothing else in ``measure`` depends on which of the two is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adapeft.measure.shards.always_trained import AlwaysTrained
from adapeft.measure.shards.arriving import Backward, Receiver, Take
from adapeft.model.input_sizes import InputSizes, reading_inputs
from adapeft.model.structure import is_linear_layer
from adapeft.ranks import OneRank, Ranks
from adapeft.tasks.losses.micro_batches import Loss, LossPair


@dataclass(frozen=True)
class Slice:
    """Elements ``start`` to ``start + length`` of the flattened candidate ``groups.parameters[parameter]``."""

    parameter: int
    start: int
    length: int


class Shards(Protocol):
    """One rank's view of the model while it is measured."""

    ranks: Ranks
    device: torch.device
    num_micro: int
    """Number of micro-batches over which every gradient is accumulated, the same on all ranks."""
    slices: tuple[Slice, ...]
    """This rank's elements, at most one slice per candidate; over all ranks every element occurs exactly once."""
    names: tuple[str, ...]
    """The candidates, then the always-trained parameters."""

    @property
    def reached(self) -> set[str]:
        """Those of ``names`` that have received a gradient on this rank, even one of zeros."""
        ...

    def arriving(self, losses: Sequence[Loss], take: Take, *, by_micro_batch: bool = False) -> None:
        """Call ``take`` with the index of each slice and its gradient as soon as the backward pass has it. Collective.

        The gradients are those of the sum of ``losses`` over all ranks, float32. Slices that get none are left out.

        Args:
            losses: this rank's ``num_micro`` micro-batches, as functions of the model.
            take: callback; ``gradients`` without keeping them all.
            by_micro_batch: call ``take`` once per micro-batch with its part of the sum. Otherwise more than one
                micro-batch takes as much memory as ``gradients``.
        """
        ...

    def arriving_both(self, pairs: Sequence[LossPair], receivers: Sequence[Receiver]) -> None:
        """Like ``arriving`` by micro-batch, for the losses at true and at sampled labels. Collective.

        Args:
            pairs: this rank's ``num_micro`` micro-batches.
            receivers: what receives the gradients at true labels, and those at sampled labels.
        """
        ...

    def gradients(self, losses: Sequence[Loss]) -> AbstractContextManager[list[Tensor]]:
        """Yield float32 gradients of the sum of ``losses`` over all ranks, aligned with ``slices``. Collective.

        They are valid only within the context. ``losses`` are this rank's ``num_micro`` micro-batches, as functions of
        the model.
        """
        ...

    def reach(self, losses: Sequence[Loss]) -> None:
        """Add the parameters to which ``losses`` give a gradient to ``reached``. Collective.

        A backward pass is computed only where the graph of the losses does not show them.
        """
        ...

    def loss(self, losses: Sequence[Loss]) -> float:
        """Return the sum of ``losses`` over all ranks and micro-batches, without gradients. Collective."""
        ...

    def weights(self) -> list[Tensor]:
        """Return copies of this rank's elements, float32 (float64 if the model is), aligned with ``slices``."""
        ...

    def write(self, candidates: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """Set candidates on all ranks. Values from ``weights`` restore them bit for bit. Collective.

        Args:
            candidates: indices of the candidates to set, the same on all ranks.
            values: candidate → this rank's elements of it [slice.length], for every candidate of which this rank has a
                slice.
        """
        ...

    def train_step(self, losses: Sequence[Loss], learning_rate: float) -> None:
        """Take one AdamW step of the always-trained parameters on the same sum of losses. Collective."""
        ...

    def trained_inputs(self) -> AbstractContextManager[InputSizes]:
        """Yield the sizes of the inputs of always-trained linear layers in this rank's passes within the context."""
        ...

    def trained_state(self) -> list[Tensor]:
        """Return the live tensors that ``train_step`` changes on this rank: values, moments and step counts."""
        ...

    def publish(self) -> None:
        """Make the model compute with the values written into ``trained_state``. Collective."""
        ...


class WholeModel:
    """Shards of ranks that each hold the whole model; the elements of every parameter are divided evenly over them."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Sequence[str],
        always_train: Sequence[str] = (),
        num_micro: int = 1,
        ranks: Ranks | None = None,
    ) -> None:
        parameters = dict(model.named_parameters())
        self.model = model
        self.ranks: Ranks = ranks or OneRank()
        self.num_micro = num_micro
        self.names = (*candidates, *always_train)
        self.reached: set[str] = set()
        self._candidates = [parameters[name] for name in candidates]
        self._always = [parameters[name] for name in always_train]
        self.device = next(model.parameters()).device
        self.slices = self._slices_of(self._candidates)
        self._places = {piece.parameter: place for place, piece in enumerate(self.slices)}
        self._always_slices = self._slices_of(self._always)
        self._measured = [*self._candidates, *self._always]
        self._passes = Backward(self._measured, [self._size(parameter) for parameter in self._measured], self.ranks)
        self._trained = AlwaysTrained(
            [self._own(self._always[piece.parameter], piece) for piece in self._always_slices]
        )

    @contextmanager
    def gradients(self, losses: Sequence[Loss]) -> Iterator[list[Tensor]]:
        """See ``Shards.gradients``."""
        gradients = [torch.empty(0)] * len(self.slices)

        def keep(place: int, gradient: Tensor) -> None:
            if len(gradients[place]):
                gradients[place].add_(gradient)
            else:  # a copy of what is a part of something larger, which would be kept too
                is_part = gradient.untyped_storage().nbytes() > gradient.nbytes
                gradients[place] = gradient.clone() if is_part else gradient

        self.arriving(losses, keep, by_micro_batch=True)
        for place, piece in enumerate(self.slices):
            if not len(gradients[place]):
                gradients[place] = torch.zeros(piece.length, device=self.device)
        yield gradients
        gradients.clear()  # the caller's loop keeps the list, and so its memory, during the next batch

    def arriving(self, losses: Sequence[Loss], take: Take, *, by_micro_batch: bool = False) -> None:
        """See ``Shards.arriving``."""
        if len(losses) > 1 and not by_micro_batch:
            with self.gradients(losses) as gradients:
                for place, gradient in enumerate(gradients):
                    take(place, gradient)
            return
        self._backward(losses, self._measured, self._own_part(take))

    def arriving_both(self, pairs: Sequence[LossPair], receivers: Sequence[Receiver]) -> None:
        """See ``Shards.arriving_both``; both backward passes walk the graph of one forward pass, if there is one."""
        shared = [pair.both for pair in pairs if pair.both is not None]
        if len(shared) < len(pairs):
            self._arriving_each(pairs, receivers)
            return
        self._train_only(self._measured)
        for both in shared:
            for loss, receiver in zip(both(self.model), receivers, strict=True):
                receiver.prepare()
                keeps_graph = receiver is not receivers[-1]
                computed = self._passes.run(loss, self._own_part(receiver.take), keeps_graph=keeps_graph)
                self.reached.update(self.names[index] for index in computed)

    def _arriving_each(self, pairs: Sequence[LossPair], receivers: Sequence[Receiver]) -> None:
        """Like ``arriving_both``, with a forward pass for each of the two losses."""
        for kind, receiver in enumerate(receivers):
            receiver.prepare()
            self.arriving([pair.each[kind] for pair in pairs], receiver.take, by_micro_batch=True)

    def reach(self, losses: Sequence[Loss]) -> None:
        """See ``Shards.reach``."""
        takes_backward = self.ranks.world_size > 1  # ranks that decide for themselves would wait for each other
        if not takes_backward:
            self._train_only(self._measured)
            graphs = [self._passes.in_graph(loss(self.model)) for loss in losses]
            self.reached.update(self.names[index] for found, _ in graphs for index in found)
            takes_backward = any(hides for _, hides in graphs) and not self.reached.issuperset(self.names)
        if takes_backward:
            self.arriving(losses, lambda place, gradient: None, by_micro_batch=True)

    @torch.no_grad()
    def loss(self, losses: Sequence[Loss]) -> float:
        """See ``Shards.loss``."""
        local = torch.zeros(1, dtype=torch.float64)
        for loss in losses:
            local += float(loss(self.model))
        return float(self.ranks.all_reduce(local))

    def weights(self) -> list[Tensor]:
        """See ``Shards.weights``."""
        return [
            own.to(self.device, torch.promote_types(own.dtype, torch.float32), copy=True)
            for own in (self._own(self._candidates[piece.parameter], piece) for piece in self.slices)
        ]

    def write(self, candidates: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """See ``Shards.write``."""
        self._set([self._candidates[candidate] for candidate in candidates], [values.get(c) for c in candidates])

    def train_step(self, losses: Sequence[Loss], learning_rate: float) -> None:
        """See ``Shards.train_step``."""
        if not self._always:
            return

        def add_own(index: int, gradient: Tensor) -> None:
            for place, piece in enumerate(self._always_slices):
                if len(self._candidates) + piece.parameter == index:
                    self._trained.add(place, gradient[piece.start : piece.start + piece.length])

        self._backward(losses, self._always, add_own)
        self._trained.step(learning_rate)
        self.publish()

    def trained_inputs(self) -> AbstractContextManager[InputSizes]:
        """See ``Shards.trained_inputs``."""
        weights = [name for name in self.names[len(self._candidates) :] if name.endswith(".weight")]
        modules = {name: self.model.get_submodule(name.removesuffix(".weight")) for name in weights}
        return reading_inputs(self.model, {name: one for name, one in modules.items() if is_linear_layer(one)})

    def trained_state(self) -> list[Tensor]:
        """See ``Shards.trained_state``."""
        return self._trained.state()

    def publish(self) -> None:
        """See ``Shards.publish``."""
        own = {piece.parameter: value for piece, value in zip(self._always_slices, self._trained.values, strict=True)}
        self._set(self._always, [own.get(index) for index in range(len(self._always))])

    def _own_part(self, take: Take) -> Take:
        """Return a callback that receives whole gradients of everything measured and hands on those of the slices."""

        def take_own(index: int, gradient: Tensor) -> None:
            if index in self._places:
                piece = self.slices[self._places[index]]
                take(self._places[index], gradient[piece.start : piece.start + piece.length].float())

        return take_own

    def _backward(self, losses: Sequence[Loss], trained: Sequence[nn.Parameter], take: Take) -> None:
        self._train_only(trained)
        for loss in losses:
            computed = self._passes.run(loss(self.model), take)
            self.reached.update(self.names[index] for index in computed)

    def _train_only(self, trained: Sequence[nn.Parameter]) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    def _slices_of(self, parameters: Sequence[nn.Parameter]) -> tuple[Slice, ...]:
        slices = []
        for index, parameter in enumerate(parameters):
            total = self._size(parameter)
            part = -(-total // self.ranks.world_size)
            start = min(self.ranks.rank * part, total)
            slices.append(Slice(index, start, min(part, total - start)))
        return tuple(piece for piece in slices if piece.length)

    def _size(self, parameter: nn.Parameter) -> int:
        return parameter.numel()

    def _own(self, parameter: nn.Parameter, piece: Slice) -> Tensor:
        """Return a view of this rank's elements."""
        return parameter.detach().flatten()[piece.start : piece.start + piece.length]

    @torch.no_grad()
    def _set(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor | None]) -> None:
        """Set parameters on all ranks from this rank's elements, None if it has none. Collective."""
        for parameter, own in zip(parameters, values, strict=True):
            nothing = torch.empty(0, dtype=torch.promote_types(parameter.dtype, torch.float32), device=self.device)
            pieces = self.ranks.all_gather(nothing if own is None else own)
            parameter.copy_(torch.cat(pieces).view_as(parameter))

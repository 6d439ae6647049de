"""Shards under ZeRO; statistics are divided over the ranks in the same way as the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import Tensor, nn

from adapeft.measure.shards import Slice, adam_state
from adapeft.ranks import Ranks
from adapeft.tasks.losses.micro_batches import Loss
from cluster.zero.engine import backward_of_sum
from cluster.zero.master_weights import MasterWeights


class ZeroShards:
    """Implementation of ``adapeft.measure.shards.Shards`` for a measuring engine at ZeRO stages 0 to 3.

    Stage 3 divides each parameter evenly over the ranks, with padding at the end. At stages 1 and 2 a rank holds a
    range of the flattened group, which may start and end inside parameters and contains nothing of some. At stage 0
    every rank has all gradients; statistics are still divided.
    """

    def __init__(
        self, engine: DeepSpeedEngine, candidates: Sequence[str], ranks: Ranks, always_train: Sequence[str] = ()
    ) -> None:
        parameters = dict(engine.module.named_parameters())
        self.engine = engine
        self.ranks: Ranks = ranks
        self.device = torch.device(engine.device)
        self.num_micro = engine.gradient_accumulation_steps()
        self.names = (*candidates, *always_train)
        self.reached: set[str] = set()
        for name in self.names:
            # Depending on the stage, parameters without a gradient show zeros or None.
            parameters[name].register_hook(partial(self._note, name))
        self._stage = engine.zero_optimization_stage()
        self._masters = MasterWeights(engine, ranks)
        held = [(index, parameters[name], *self._range(parameters[name])) for index, name in enumerate(candidates)]
        held = [entry for entry in held if entry[3] > 0]
        self._held = [(parameter, start, length) for _, parameter, start, length in held]
        self.slices = tuple(Slice(index, start, length) for index, _, start, length in held)
        # safe_get_full_grad is a collective: every rank calls it for every candidate, in the same order.
        self._candidates = [parameters[name] for name in candidates]
        self._always = [parameters[name] for name in always_train]

    @contextmanager
    def gradients(self, losses: Sequence[Loss]) -> Iterator[list[Tensor]]:
        """See ``adapeft.measure.shards.Shards.gradients``."""
        self._backward(losses)
        gradients = self._local_gradients()
        yield gradients
        gradients.clear()  # the caller's loop keeps the list during the next batch, and would keep its memory
        self.engine.step()

    @torch.no_grad()
    def loss(self, losses: Sequence[Loss]) -> float:
        """See ``adapeft.measure.shards.Shards.loss``."""
        local = torch.zeros(1, dtype=torch.float64)
        for loss in losses:
            local += float(loss(self.engine))
        return float(self.ranks.all_reduce(local))

    def weights(self) -> list[Tensor]:
        """See ``adapeft.measure.shards.Shards.weights``."""
        if self._stage == 3:
            return [
                parameter.ds_tensor[:length].to(self.device, torch.float32, copy=True)
                for parameter, _, length in self._held
            ]
        return [
            parameter.detach().flatten()[start : start + length].float().clone()
            for parameter, start, length in self._held
        ]

    @torch.no_grad()
    def write(self, candidates: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """See ``adapeft.measure.shards.Shards.write``."""
        nothing = torch.empty(0, device=self.device)
        for candidate in candidates:
            parameter = self._candidates[candidate]
            if self._stage == 0:  # every rank has the whole parameter: concatenate the pieces by rank
                pieces = self.ranks.all_gather(values.get(candidate, nothing))
                parameter.copy_(torch.cat(pieces).view_as(parameter))
            elif candidate in values:
                flat, offset, _, length = self._masters.range_of(parameter)  # type: ignore[misc]
                flat[offset : offset + length] = values[candidate]
        self._masters.publish()

    def train_step(self, losses: Sequence[Loss], learning_rate: float) -> None:
        """See ``adapeft.measure.shards.Shards.train_step``."""
        if len(self.engine.optimizer.param_groups) < 2:
            return
        always_trained = self.engine.optimizer.param_groups[1]
        always_trained["lr"] = learning_rate
        # Otherwise the gradients of the candidates would be computed, reduced and discarded.
        for parameter in self._candidates:
            parameter.requires_grad_(False)
        self._backward(losses)
        for parameter in self._candidates:
            parameter.requires_grad_(True)
        self.engine.step()
        always_trained["lr"] = 0.0

    def trained_state(self) -> list[Tensor]:
        """See ``adapeft.measure.shards.Shards.trained_state``."""
        places = [self._masters.range_of(parameter) for parameter in self._always]
        # Each group of the optimizer holds either only always-trained parameters or none.
        flats = {id(place.flat): place.flat for place in places if place is not None and place.length}
        optimizer = self.engine.basic_optimizer
        return [tensor for flat in flats.values() for tensor in (flat, *adam_state(optimizer, flat).values())]

    def publish(self) -> None:
        """See ``adapeft.measure.shards.Shards.publish``."""
        self._masters.publish()

    def _note(self, name: str, gradient: Tensor) -> None:
        self.reached.add(name)

    def _backward(self, losses: Sequence[Loss]) -> None:
        for loss in losses:
            backward_of_sum(self.engine, loss(self.engine))
            if loss is not losses[-1]:
                self.engine.step()

    def _local_gradients(self) -> list[Tensor]:
        if self._stage == 3:
            return [safe_get_local_grad(parameter)[:length].float() for parameter, _, length in self._held]
        if self._stage > 0 and getattr(self._candidates[0], "_hp_grad", None) is None:
            return [_fragment(parameter) for parameter, _, _ in self._held]
        whole = {id(parameter): _full_gradient(parameter) for parameter in self._candidates}
        return [whole[id(parameter)][start : start + length] for parameter, start, length in self._held]

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return (start, length) of this rank's part of a flattened parameter; the length may be 0."""
        if self._stage in (1, 2):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
        if self._stage == 3:
            total, part = parameter.ds_numel, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        else:
            total, part = parameter.numel(), -(-parameter.numel() // self.ranks.world_size)
        start = min(self.ranks.rank * part, total)
        return start, min(part, total - start)


def _fragment(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a gradient at stages 1 and 2, without a collective."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten().float()  # type: ignore[attr-defined]


def _full_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = safe_get_full_grad(parameter)
    return torch.zeros_like(parameter).flatten().float() if gradient is None else gradient.flatten().float()

"""Shards of a model at any ZeRO stage; statistics are divided over the ranks evenly, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from adapeft.measure.shards.arriving import Receiver, Take
from adapeft.measure.shards.shards import Slice, WholeModel
from adapeft.ranks import Ranks
from adapeft.tasks.losses.micro_batches import Loss, LossPair


def shards_of(
    engine: nn.Module, candidates: Sequence[str], always_train: Sequence[str], num_micro: int, ranks: Ranks
) -> WholeModel:
    """Return the shards of a model that ``inference_engine`` has prepared."""
    if isinstance(engine, DeepSpeedEngine):
        return DividedModel(engine, candidates, always_train, num_micro, ranks)
    return WholeModel(engine, candidates, always_train, num_micro, ranks)


class DividedModel(WholeModel):
    """Shards of a model whose weights stage 3 divides over the ranks, in the same way as the statistics."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        candidates: Sequence[str],
        always_train: Sequence[str] = (),
        num_micro: int = 1,
        ranks: Ranks | None = None,
    ) -> None:
        self._division = engine.optimizer
        # The engine's own forward would prepare a backward pass by DeepSpeed.
        super().__init__(engine.module, candidates, always_train, num_micro, ranks)

    def arriving_both(self, pairs: Sequence[LossPair], receivers: Sequence[Receiver]) -> None:
        """See ``Shards.arriving_both``; DeepSpeed gathers weights for one backward pass per forward pass."""
        self._arriving_each(pairs, receivers)

    def reach(self, losses: Sequence[Loss]) -> None:
        """See ``Shards.reach``; a forward pass alone would leave weights gathered."""
        self.arriving(losses, lambda place, gradient: None, by_micro_batch=True)

    def _backward(self, losses: Sequence[Loss], trained: Sequence[nn.Parameter], take: Take) -> None:
        super()._backward(losses, trained, take)
        # Weights of modules whose inputs need no gradient, such as embeddings, are still gathered.
        self._division.release_backward_leftovers()

    def _size(self, parameter: nn.Parameter) -> int:
        size: int = parameter.ds_numel  # type: ignore[attr-defined]
        return size

    def _own(self, parameter: nn.Parameter, piece: Slice) -> Tensor:
        own: Tensor = parameter.ds_tensor.detach()[: piece.length]  # type: ignore[attr-defined]
        return own

    @torch.no_grad()
    def _set(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor | None]) -> None:
        gathered = []
        for parameter, own in zip(parameters, values, strict=True):
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                parameter.partition()  # type: ignore[attr-defined]
                gathered.append(parameter)
            if own is not None:
                parameter.ds_tensor[: len(own)].copy_(own)  # type: ignore[attr-defined]
        if gathered:  # kept whole on every rank
            gathered[0].all_gather(gathered)  # type: ignore[attr-defined]

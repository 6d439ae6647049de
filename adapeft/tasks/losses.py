"""A global batch as this rank's micro-batch losses: measuring and training divide work in the same way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from adapeft.data.batches import micro_batches
from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.ranks import Ranks
from adapeft.tasks.objective import Objective

Collate = Callable[[np.ndarray], Batch]
"""Example indices → a micro-batch."""

Loss = Callable[[nn.Module], Tensor]
"""One micro-batch's part of a global batch's mean loss, given the model."""


def micro_losses(
    batch: np.ndarray,
    collate: Collate,
    objective: Objective,
    ranks: Ranks,
    num_micro: int,
    device: torch.device,
    sample_seed: int | None = None,
) -> tuple[list[Loss], int]:
    """This rank's ``num_micro`` losses, whose sum over ranks and micro-batches is the mean over the global batch.

    Args:
        batch: example indices of the whole global batch.
        collate: makes a micro-batch.
        objective: the task's.
        ranks: who shares the batch.
        num_micro: micro-batches a rank, the same on all.
        device: where the model is.
        sample_seed: labels are sampled from the model under this seed; None takes the true ones.

    Returns:
        The losses, and the number of predictions that the mean is over; where that is 0, so are losses and gradients.
        Collective.
    """
    shares = micro_batches(batch, ranks.rank, ranks.world_size, num_micro)
    # A rank without examples still takes part in every collective of the model's forward, at weight 0.
    micros = [(collate(share if len(share) else batch[:1]), bool(len(share))) for share in shares]
    local = sum(objective.num_predictions(micro.labels) for micro, counts in micros if counts)
    total = int(ranks.all_reduce(torch.tensor([local], device=device)).item())

    def loss_of(micro: Batch, weight: float) -> Loss:
        def loss(model: nn.Module) -> Tensor:
            return _loss_sum(objective, micro, sample_seed, model) * weight

        return loss

    return [loss_of(micro.to(device), 1.0 / total if counts and total else 0.0) for micro, counts in micros], total


class Watched:
    """Losses whose values are kept, so that it can be told afterwards whether they were finite.

    Attributes:
        losses: the same losses.
        values: of those that were computed, detached.
    """

    def __init__(self, losses: list[Loss]) -> None:
        self.values: list[Tensor] = []
        self.losses: list[Loss] = [partial(self._keep, loss) for loss in losses]

    def total(self) -> float:
        """Sum of the values."""
        return float(sum(value.double() for value in self.values))

    def _keep(self, loss: Loss, model: nn.Module) -> Tensor:
        value = loss(model)
        self.values.append(value.detach())
        return value


def example_losses(
    batch: np.ndarray,
    collate: Collate,
    objective: Objective,
    device: torch.device,
    evaluate: Callable[[Loss], float],
    sample_seed: int | None = None,
) -> dict[int, float]:
    """The summed loss of each example of a global batch by itself, by its id: one forward pass per example.

    Args:
        batch: what ``collate`` takes.
        collate: makes a micro-batch.
        objective: the task's.
        device: where the model is.
        evaluate: computes a loss without gradients. Where that is collective, every rank goes through all examples.
        sample_seed: as for ``micro_losses``.
    """
    found = {}
    for index in batch:
        micro = collate(np.array([index])).to(device)
        for row, example in enumerate(micro.ids.tolist()):
            found[example] = evaluate(partial(_loss_sum, objective, micro.example(row), sample_seed))
    return found


def _loss_sum(objective: Objective, batch: Batch, sample_seed: int | None, model: nn.Module) -> Tensor:
    logits = objective.forward(model, batch)
    labels = batch.labels if sample_seed is None else objective.sample_labels(logits, batch, sample_seed)
    with naming_examples(batch):
        return objective.loss_sum(logits, labels)

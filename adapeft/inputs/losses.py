"""A global batch as this rank's micro-batch losses: measuring and training divide work in the same way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from adapeft.inputs.batches import micro_batches
from adapeft.inputs.data import Batch
from adapeft.inputs.objective import Objective
from adapeft.inputs.refused_batch import naming_examples
from adapeft.ranks import Ranks

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
            logits = objective.forward(model, micro)
            labels = micro.labels if sample_seed is None else objective.sample_labels(logits, micro, sample_seed)
            with naming_examples(micro):
                return objective.loss_sum(logits, labels) * weight

        return loss

    return [loss_of(micro.to(device), 1.0 / total if counts and total else 0.0) for micro, counts in micros], total

"""The micro-batch losses of a global batch on this rank; measuring and training divide batches in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from adapeft.data.batches import micro_batches
from adapeft.data.description import Batch
from adapeft.ranks import Ranks
from adapeft.tasks.losses.objective import MeanLoss

Collate = Callable[[np.ndarray], Batch]
"""Example indices → a micro-batch."""

Loss = Callable[[nn.Module], Tensor]
"""Model → one micro-batch's share of the mean loss over a global batch."""

_Share = Callable[[nn.Module, Sequence[int | None]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class LossPair:
    """One micro-batch's shares of the mean losses at true labels and at labels sampled from the model.

    Attributes:
        each: the two losses, with a forward pass each.
        both: function that returns both from one forward pass; None if each needs its own.
    """

    each: tuple[Loss, Loss]
    both: Callable[[nn.Module], tuple[Tensor, ...]] | None


def micro_losses(
    batch: np.ndarray,
    collate: Collate,
    objective: MeanLoss,
    ranks: Ranks,
    num_micro: int,
    device: torch.device,
    sample_seed: int | None = None,
) -> tuple[list[Loss], int]:
    """Return this rank's ``num_micro`` losses, whose sum over ranks and micro-batches is the global batch's mean loss.

    Collective.

    Args:
        batch: example indices of the global batch.
        collate: function that builds a micro-batch.
        objective: loss of the task.
        ranks: ranks that share the batch.
        num_micro: number of micro-batches per rank, the same on all ranks.
        device: device of the model.
        sample_seed: seed of labels that are sampled from the model; None: the true labels.

    Returns:
        The losses, and the number of predictions in the mean; if it is 0, losses and gradients are 0 too.
    """
    shares, total = _shares(batch, collate, objective, ranks, num_micro, device)
    return [_loss_of(share, sample_seed) for share in shares], total


def micro_pairs(
    batch: np.ndarray,
    collate: Collate,
    objective: MeanLoss,
    ranks: Ranks,
    num_micro: int,
    device: torch.device,
    sample_seed: int,
) -> tuple[list[LossPair], int]:
    """Return this rank's losses at true and at sampled labels; otherwise like ``micro_losses``."""
    shares, total = _shares(batch, collate, objective, ranks, num_micro, device)
    return [_pair_of(share, sample_seed, shares_forward=objective.shares_forward) for share in shares], total


def _shares(
    batch: np.ndarray, collate: Collate, objective: MeanLoss, ranks: Ranks, num_micro: int, device: torch.device
) -> tuple[list[_Share], int]:
    """Return functions of model and seeds of sampled labels, one per micro-batch, and the number of predictions."""
    shares = micro_batches(batch, ranks.rank, ranks.world_size, num_micro)
    # A rank without examples still takes part in every collective of the model's forward, at weight 0.
    micros = [(collate(share if len(share) else batch[:1]), bool(len(share))) for share in shares]
    local = sum(objective.num_predictions(micro.labels) for micro, counts in micros if counts)
    sizes = torch.zeros(ranks.world_size, 1 + num_micro, dtype=torch.int64, device=device)
    sizes[ranks.rank] = torch.tensor([local, *(micro.labels.numel() for micro, _ in micros)])
    ranks.all_reduce(sizes)
    total, largest = int(sizes[:, 0].sum()), sizes[:, 1:].amax(0).tolist()

    def share_of(micro: Batch, weight: float, num_labels: int) -> _Share:
        def share(model: nn.Module, sample_seeds: Sequence[int | None]) -> tuple[Tensor, ...]:
            losses = objective.losses(model, micro, sample_seeds, num_labels=num_labels)
            return tuple(loss * weight for loss in losses)

        return share

    weights = [1.0 / total if counts and total else 0.0 for _, counts in micros]
    return [
        share_of(micro.to(device), weight, num_labels)
        for (micro, _), weight, num_labels in zip(micros, weights, largest, strict=True)
    ], total


def _loss_of(share: _Share, sample_seed: int | None) -> Loss:
    return lambda model: share(model, [sample_seed])[0]


def _pair_of(share: _Share, sample_seed: int, *, shares_forward: bool) -> LossPair:
    each = _loss_of(share, None), _loss_of(share, sample_seed)
    return LossPair(each, (lambda model: share(model, [None, sample_seed])) if shares_forward else None)


class Watched:
    """Losses that record their values, to check afterwards whether they were finite.

    Attributes:
        losses: the wrapped losses.
        values: detached values of the losses computed so far.
    """

    def __init__(self, losses: list[Loss]) -> None:
        self.values: list[Tensor] = []
        self.losses: list[Loss] = [partial(self._keep, loss) for loss in losses]

    def total(self) -> float:
        return float(sum(value.double() for value in self.values))

    def _keep(self, loss: Loss, model: nn.Module) -> Tensor:
        value = loss(model)
        self.values.append(value.detach())
        return value


def watched_pairs(pairs: Sequence[LossPair]) -> tuple[list[LossPair], tuple[Watched, Watched]]:
    """Return the pairs so that their values at true and at sampled labels are recorded, and the records."""
    true, sampled = (Watched([pair.each[kind] for pair in pairs]) for kind in range(2))

    def both(compute: Callable[[nn.Module], tuple[Tensor, ...]], model: nn.Module) -> tuple[Tensor, ...]:
        values = compute(model)
        for watched, value in zip((true, sampled), values, strict=True):
            watched.values.append(value.detach())
        return values

    losses = zip(pairs, true.losses, sampled.losses, strict=True)
    return [
        LossPair(each, None if pair.both is None else partial(both, pair.both))  # type: ignore[arg-type]
        for pair, *each in losses
    ], (true, sampled)


def example_losses(
    batch: np.ndarray,
    collate: Collate,
    objective: MeanLoss,
    device: torch.device,
    evaluate: Callable[[Loss], float],
    sample_seed: int | None = None,
) -> dict[int, float]:
    """Return the summed loss of each example of a global batch by its id, with one forward pass per example.

    Args:
        batch: example indices of the global batch.
        collate: function that builds a micro-batch.
        objective: loss of the task.
        device: device of the model.
        evaluate: function that computes a loss without gradients; if it is collective, every rank must pass the same
            batch.
        sample_seed: as in ``micro_losses``.
    """
    found = {}
    for index in batch:
        micro = collate(np.array([index])).to(device)
        for row, example in enumerate(micro.ids.tolist()):
            found[example] = evaluate(partial(objective.loss, batch=micro.example(row), sample_seed=sample_seed))
    return found

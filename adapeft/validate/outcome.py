"""Measured loss decrease of training a subset for a few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.finite import blame
from adapeft.ranks import OneRank
from adapeft.subset.subset import Subset
from adapeft.tasks.losses.micro_batches import Collate, micro_losses
from adapeft.tasks.losses.objective import Objective
from adapeft.tune.attach import attach, detach
from adapeft.tune.attachment import attachment_of


class Trial:
    """Trains subsets of one model, each from the same weights over the same batches, and measures held-out losses.

    The decrease is that of a subset beyond training the always-trained part alone, which is what influence predicts.

    Args:
        model: model in evaluation mode, because the noise of dropout would hide small differences.
        objective: objective of the task.
        collate: function from example indices of the training set to a micro-batch.
        batches: example indices, one global batch per step, in order.
        held_out: (collate, batches) of the held-out examples.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        collate: Collate,
        batches: Sequence[np.ndarray],
        held_out: tuple[Collate, Sequence[np.ndarray]],
    ) -> None:
        self.model, self.objective, self.collate, self.batches, self.held_out = (
            model,
            objective,
            collate,
            batches,
            held_out,
        )
        self.device = next(model.parameters()).device
        self.base_loss = self.held_out_loss()
        if not math.isfinite(self.base_loss):
            raise AdapeftError(
                f"the held-out loss of the base model is {self.base_loss}, so no decrease can be measured. "
                f"{blame(self._held_out_losses(), 'data.evaluation')}"
            )
        self._alone: dict[tuple[float, tuple[int, ...]], list[float]] = {}

    def decreases(self, subset: Subset, learning_rate: float, horizons: Sequence[int]) -> list[float]:
        """Return decreases of the held-out loss after each of ``horizons`` steps of Adam at a constant learning rate.

        They are relative to training the always-trained part alone at the same learning rate, and −inf once training
        has diverged, which ranks it after every other outcome. The model is restored before this returns.

        Raises:
            AdapeftError: training the always-trained part alone diverges, so there is nothing to compare with.
        """
        key = (learning_rate, tuple(horizons))
        if key not in self._alone:
            alone = replace(subset, parts={})
            losses = self._losses(alone, *key) if alone.always_train else [self.base_loss] * len(horizons)
            if not all(map(math.isfinite, losses)):
                raise AdapeftError(
                    f"training only the parameters of select.always_train diverges at a learning rate of "
                    f"{learning_rate:g}, so the gain of a subset cannot be measured against it. Leave that learning "
                    f"rate out."
                )
            self._alone[key] = losses
        return [without - loss for without, loss in zip(self._alone[key], self._losses(subset, *key), strict=True)]

    def _losses(self, subset: Subset, learning_rate: float, horizons: Sequence[int]) -> list[float]:
        """Return the held-out losses after each of ``horizons`` steps; they are infinite once training has diverged."""
        parameters = dict(self.model.named_parameters())
        # Detaching restores only parameters of the base, which does not contain a new head.
        heads = {name: parameters[name].detach().clone() for name in subset.always_train}
        attach(self.model, subset, alone=True)  # the ranks divide the subsets
        try:
            trained = list(attachment_of(self.model).trained.values())
            optimizer = torch.optim.Adam(trained, lr=learning_rate)
            found = []
            for step in range(max(horizons)):
                batch = self.batches[step % len(self.batches)]
                losses, _ = micro_losses(batch, self.collate, self.objective, OneRank(), 1, self.device)
                losses[0](self.model).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if step + 1 in horizons:
                    loss = self.held_out_loss()
                    found.append(loss if math.isfinite(loss) else math.inf)
            return found
        finally:
            detach(self.model)
            with torch.no_grad():
                for name, value in heads.items():
                    parameters[name].copy_(value)

    def held_out_loss(self) -> float:
        """Return the mean loss over the held-out predictions."""
        total, count = 0.0, 0
        for batch in self.held_out[1]:
            loss, num_predictions = self._held_out(batch)
            total, count = total + loss, count + num_predictions
        return total / count

    def _held_out_losses(self) -> dict[int, float]:
        """Return the loss of each held-out example by its number."""
        numbers = (int(number) for batch in self.held_out[1] for number in batch)
        return {number: self._held_out(np.array([number]))[0] for number in numbers}

    @torch.no_grad()
    def _held_out(self, batch: np.ndarray) -> tuple[float, int]:
        """Return the summed loss over some held-out examples, and the number of their predictions."""
        examples = self.held_out[0](batch).to(self.device)
        return float(self.objective.loss(self.model, examples)), self.objective.num_predictions(examples.labels)

"""A loss that the user gives as a function of the model and a batch, such as the one of a trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.tasks.losses.draws import wide
from adapeft.tasks.losses.objective import MeanLoss

LossFunction = Callable[..., Tensor]
"""``loss(model, batch)`` → the terms [T] whose mean is the loss; ``loss(model, batch, generator=…)``: at labels drawn
from the model."""

_GENERATOR = "generator"

_PROTOCOL = (
    "Return a tensor [T] of the T terms whose mean is the loss, one per label that counts (reduction='none', without "
    "padding)"
)


class FunctionLoss(MeanLoss):
    """The mean of the terms that ``loss`` returns. The inputs of its batches are all that the user's batches hold.

    Attributes:
        can_sample: whether the function can draw labels from the model.
    """

    summary = "the loss given as loss="

    def __init__(self, loss: LossFunction) -> None:
        self._loss = loss
        try:
            signature = inspect.signature(loss)
            signature.bind(None, None)
        except (TypeError, ValueError) as error:
            raise AdapeftError(
                f"loss = {loss!r} cannot be called as loss(model, batch): {error}. Give a function of the model and a "
                f"batch, or the name of a task."
            ) from error
        self.can_sample = _GENERATOR in signature.parameters

    def batch(self, model: nn.Module, given: Mapping[str, Any], index: int) -> Batch:
        """Return a batch of the user's as one for measuring, with a label for every term of its loss.

        Raises:
            AdapeftError: the function does not return terms.
        """
        inputs = dict(given)
        with torch.no_grad():
            terms = self._loss(model, inputs)
        _check_terms(terms, f"for batch {index} (counted from 0)", 1)
        return Batch(inputs, torch.zeros(terms.numel()), torch.tensor([index]))

    @torch.no_grad()
    def check_samples(self, model: nn.Module, batch: Batch) -> None:
        """Check that the function draws labels from its generator, one for each term.

        Raises:
            AdapeftError: it does not.
        """
        generator = self._generator(model, batch, 0)
        before = generator.get_state()
        terms = self._loss(model, batch.inputs, generator=generator)
        _check_terms(terms, "with a generator", 0)
        if torch.equal(before, generator.get_state()):
            raise AdapeftError(
                "loss: the function draws nothing from the generator that it is given, so its gradients would not be "
                "those at labels drawn from the model. Draw labels with it, as in torch.bernoulli(p, "
                "generator=generator) or torch.multinomial(p, 1, generator=generator)."
            )

    def num_predictions(self, labels: Tensor) -> int:
        """See ``MeanLoss.num_predictions``."""
        return labels.numel()

    def loss(
        self, model: nn.Module, batch: Batch, *, sample_seed: int | None = None, num_labels: int | None = None
    ) -> Tensor:
        """See ``MeanLoss.loss``."""
        if sample_seed is None:
            terms = self._loss(model, batch.inputs)
        else:
            terms = self._loss(model, batch.inputs, generator=self._generator(model, batch, sample_seed))
        if torch.is_grad_enabled() and not terms.requires_grad:
            raise AdapeftError(
                "loss: the terms that the function returned have no gradient. Compute them from the model's outputs "
                "without torch.no_grad(), detach() or item()."
            )
        if terms.numel() != batch.labels.numel():
            raise AdapeftError(
                f"loss: the function returned {terms.numel()} terms for batch {int(batch.ids[0])} (counted from 0), "
                f"but {batch.labels.numel()} before. Their number must depend on the batch alone."
            )
        return wide(terms).sum()

    def _generator(self, model: nn.Module, batch: Batch, seed: int) -> torch.Generator:
        """Return the generator of a batch's draws."""
        state = int(np.random.SeedSequence([seed, int(batch.ids[0])]).generate_state(1)[0])
        return torch.Generator(next(model.parameters()).device).manual_seed(state)


def _check_terms(terms: Any, where: str, most_reduced: int) -> None:
    """Check what a function returned.

    Args:
        most_reduced: 1 if a scalar, as the only term, is valid, else 0.
    """
    if isinstance(terms, Tensor) and terms.is_floating_point() and 1 - most_reduced <= terms.ndim <= 1:
        return
    found = f"a tensor {terms.dtype} {list(terms.shape)}" if isinstance(terms, Tensor) else f"a {type(terms).__name__}"
    raise AdapeftError(f"loss: the function returned {found} {where}. {_PROTOCOL}.")

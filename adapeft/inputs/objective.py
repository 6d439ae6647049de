"""The loss of a task: its sum over predictions, and labels sampled from the model's own distribution.

Sampled labels turn squared gradients into curvature: for a loss that is a negative log-likelihood the Fisher matrix is
the Gauss-Newton matrix, and a gradient at sampled labels is a draw whose second moment it is (Martens, "New insights
and perspectives on the natural gradient method", 2020, section 9).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.inputs.data import Batch
from adapeft.inputs.refused_batch import naming_examples

IGNORED = -100

_KNOWN = "classes [n], one target [n] or the tokens of a causal language model [n, T]"


class Objective(ABC):
    """One task's loss. Shapes: logits [n, C] or [n, T, C]; labels as in ``Batch``; n examples, T tokens, C classes."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of a micro-batch, in the model's dtype."""
        with naming_examples(batch):
            return model(**batch.inputs).logits

    @abstractmethod
    def num_predictions(self, labels: Tensor) -> int:
        """How many predictions the loss sums over: examples, or tokens for a language model."""

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed (not averaged) loss in float32, or in float64 where the logits are."""

    @abstractmethod
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        """Labels drawn from the model's distribution, a function of the example's id and ``seed`` alone."""


class Classification(Objective):
    """Cross-entropy over C classes, labels int64 [n]."""

    def num_predictions(self, labels: Tensor) -> int:
        return len(labels)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_wide(logits), labels, reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        return _sample_categorical(logits, _uniforms(batch.ids, 1, seed).squeeze(1))


class Regression(Objective):
    """Squared error (y − f)², labels float32 [n], logits [n, 1]."""

    def num_predictions(self, labels: Tensor) -> int:
        return len(labels)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        predictions = _wide(logits).squeeze(-1)
        return F.mse_loss(predictions, labels.to(predictions.dtype), reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        # (y − f)² has Gauss-Newton matrix 2·JᵀJ; y ~ N(f, s²) gives E[gᵀg] = 4·s²·JᵀJ, so s² = 1/2.
        normal = torch.special.ndtri(_uniforms(batch.ids, 1, seed).squeeze(1)).to(logits.device)
        return logits.float().squeeze(-1) + normal.float() * 0.5**0.5


class NextToken(Objective):
    """Cross-entropy of the next token, labels int64 [n, T] as in transformers: not shifted, -100 where ignored."""

    def num_predictions(self, labels: Tensor) -> int:
        return int((labels[:, 1:] != IGNORED).sum())

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            _wide(logits)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        labels = batch.labels
        uniforms = _uniforms(batch.ids, labels.shape[1] - 1, seed)
        sampled = labels.clone()
        # An example at a time: the cumulative distribution of a whole batch over a large vocabulary does not fit.
        for row, uniform in enumerate(uniforms):
            sampled[row, 1:] = _sample_categorical(logits[row, :-1], uniform)
        return torch.where(labels == IGNORED, IGNORED, sampled)


def objective_for(task: str, is_regression: bool) -> Objective:
    """The objective of a config's ``model.task``."""
    if task == "causal-lm":
        return NextToken()
    return Regression() if is_regression else Classification()


def infer_objective(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Objective:
    """The objective that transformers would use for ``labels`` of this shape and dtype.

    Raises:
        AdapeftError: it would use another than these three.
    """
    loss = getattr(model, "loss_type", None)
    if loss in ("ForMaskedLM", "ForTokenClassification"):
        raise AdapeftError(f"a model with the loss {loss!r} cannot be measured: only {_KNOWN} can.")
    if labels.ndim == 2 and labels.shape == inputs["input_ids"].shape:
        return NextToken()
    if labels.ndim != 1:
        raise AdapeftError(f"labels of shape {list(labels.shape)}: only those of {_KNOWN} can be measured.")
    # As transformers: one output means regression, whatever the dtype of its targets.
    one_output = getattr(getattr(model, "config", None), "num_labels", None) == 1
    return Regression() if labels.is_floating_point() or one_output else Classification()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _uniforms(ids: Tensor, length: int, seed: int) -> Tensor:
    """float64 [n, length] in (0, 1); a row is the stream of (seed, example id), so no rank or batch changes it."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, example])).random(length) for example in ids.tolist()]
    return torch.from_numpy(np.stack(streams)).clamp(1e-12, 1 - 1e-12)


def _sample_categorical(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: logits [m, C], uniforms [m] → int64 [m]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    draws = torch.searchsorted(cumulative, uniforms.to(logits.device).unsqueeze(-1)).squeeze(-1)
    return draws.clamp(max=logits.shape[-1] - 1)

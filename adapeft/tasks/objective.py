"""The loss of a task: its sum over predictions, and labels sampled from the model's own distribution.

Sampled labels turn squared gradients into curvature: for a loss that is a negative log-likelihood the Fisher matrix is
the Gauss-Newton matrix, and a gradient at sampled labels is a draw whose second moment it is (Martens, "New insights
and perspectives on the natural gradient method", 2020, section 9).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.errors import AdapeftError

IGNORED = -100
"""The label of what is not to be predicted, as in transformers."""

_KNOWN = (
    "classes [n], targets [n] (or [n, K] with config.problem_type = 'regression') and the tokens [n, T] of a causal "
    "language model or an encoder-decoder"
)
_CLASSIFIERS = {
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
}
_LANGUAGE_MODELS = {"ForCausalLM", "ForConditionalGeneration"}


class Objective(ABC):
    """One task's loss. Shapes: logits [n, C] or [n, T, C]; labels as in ``Batch``; n examples, T tokens, C classes.

    Attributes:
        summary: what the loss is, for messages.
    """

    summary: str

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of a micro-batch, in the model's dtype."""
        with naming_examples(batch):
            return model(**batch.inputs).logits

    @abstractmethod
    def predicted(self, labels: Tensor) -> Tensor:
        """Which labels the loss sums over, bool of the labels' shape. Losses, means and metrics all count by it."""

    def num_predictions(self, labels: Tensor) -> int:
        """How many predictions the loss sums over: examples, targets or tokens."""
        return int(self.predicted(labels).sum())

    def outside(self, labels: Tensor, num_outputs: int) -> Tensor:
        """The labels that none of the model's ``num_outputs`` outputs stands for, 1-D."""
        return labels[self.predicted(labels) & ((labels < 0) | (labels >= num_outputs))]

    @abstractmethod
    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether the shapes are those of this loss."""

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed (not averaged) loss in float32, or in float64 where the logits are."""

    @abstractmethod
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        """Labels drawn from the model's distribution, a function of the example's id and ``seed`` alone."""


class Classification(Objective):
    """Cross-entropy over C classes, labels int64 [n], -100 where ignored."""

    summary = "cross-entropy over the classes"

    def predicted(self, labels: Tensor) -> Tensor:
        return labels != IGNORED

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 2 and logits.shape[:1] == labels.shape

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        sampled = _sample_categorical(logits, _uniforms(batch.ids, 1, seed).squeeze(1))
        return torch.where(self.predicted(batch.labels), sampled, IGNORED)


class Regression(Objective):
    """Squared error (y − f)², labels float32 [n] with logits [n, 1], or labels and logits [n, K]."""

    summary = "squared error"

    def predicted(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def outside(self, labels: Tensor, num_outputs: int) -> Tensor:
        return labels[:0].flatten()  # a target is any number

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.shape in (labels.shape, (*labels.shape, 1))

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        predictions = _wide(logits).reshape(labels.shape)
        return F.mse_loss(predictions, labels.to(predictions.dtype), reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        # (y − f)² has Gauss-Newton matrix 2·JᵀJ; y ~ N(f, s²) gives E[gᵀg] = 4·s²·JᵀJ, so s² = 1/2.
        shape = batch.labels.shape
        normal = torch.special.ndtri(_uniforms(batch.ids, shape[1:].numel(), seed)).to(logits.device)
        return logits.float().reshape(shape) + normal.float().reshape(shape) * 0.5**0.5


class NextToken(Objective):
    """Cross-entropy of the next token, labels int64 [n, T] as in transformers: not shifted, -100 where ignored."""

    summary = "cross-entropy of the next token, over all tokens with a label"

    def predicted(self, labels: Tensor) -> Tensor:
        predicted = labels != IGNORED
        predicted[:, :1] = False  # nothing comes before the first token
        return predicted

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 3 and logits.shape[:-1] == labels.shape

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            _wide(logits)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        labels = batch.labels
        sampled = labels.clone()
        sampled[:, 1:] = _sample_tokens(logits[:, :-1], labels[:, 1:], batch.ids, seed)
        return sampled


class SequenceToSequence(Objective):
    """Cross-entropy of the decoder's tokens, labels int64 [n, T], -100 where ignored; logits [n, T, C] predict them.

    The decoder reads the tokens before each label, whichever label the loss then takes: a sampled one, too.
    """

    summary = "cross-entropy of the decoder's tokens, over all with a label"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        # Given the labels, the model makes the decoder's input of them where the batch has none, each in its own way
        # (without them BART would make it of the encoder's input). The loss that it computes as well is not used.
        with naming_examples(batch):
            return model(**batch.inputs, labels=batch.labels).logits

    def predicted(self, labels: Tensor) -> Tensor:
        return labels != IGNORED

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 3 and logits.shape[:-1] == labels.shape

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        return _sample_tokens(logits, batch.labels, batch.ids, seed)


def objective_for(task: str, is_regression: bool) -> Objective:
    """The objective of a config's ``model.task``."""
    if task == "causal-lm":
        return NextToken()
    return Regression() if is_regression else Classification()


def infer_objective(model: nn.Module, labels: Tensor) -> Objective:
    """The objective that transformers would use for ``labels`` of this shape and dtype.

    It follows from the model's config and class; ``check_own_loss`` compares it with the loss that the model computes.

    Raises:
        AdapeftError: it would use another than these four.
    """
    loss = getattr(model, "loss_type", None)
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    # T5Gemma names the loss of its decoder after masked language models, which do not shift their labels either.
    is_decoder_loss = is_encoder_decoder and loss == "ForMaskedLM"
    if loss is not None and loss not in _CLASSIFIERS | _LANGUAGE_MODELS and not is_decoder_loss:
        raise AdapeftError(f"a model with the loss {loss!r} cannot be measured: only {_KNOWN} can.")
    if problem == "multi_label_classification":
        raise AdapeftError(
            f"config.problem_type = {problem!r}: several labels for each example cannot be measured, only {_KNOWN} can."
        )
    one_output = getattr(config, "num_labels", None) == 1
    if labels.ndim == 2 and labels.is_floating_point() and (one_output or problem == "regression"):
        return Regression()
    if labels.ndim == 2 and not labels.is_floating_point() and loss not in _CLASSIFIERS:
        return SequenceToSequence() if is_encoder_decoder else NextToken()
    if labels.ndim != 1:
        kind = str(labels.dtype).removeprefix("torch.")
        raise AdapeftError(
            f"labels of shape {list(labels.shape)} and type {kind}: only those of {_KNOWN} can be measured."
        )
    # As transformers: one output means regression, whatever the dtype of its targets.
    return Regression() if labels.is_floating_point() or one_output else Classification()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _uniforms(ids: Tensor, length: int, seed: int) -> Tensor:
    """float64 [n, length] in (0, 1); a row is the stream of (seed, example id), so no rank or batch changes it."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, example])).random(length) for example in ids.tolist()]
    return torch.from_numpy(np.stack(streams)).clamp(1e-12, 1 - 1e-12)


def _sample_tokens(logits: Tensor, labels: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Tokens int64 [n, T] sampled from logits [n, T, C], -100 where the labels are."""
    sampled = torch.empty_like(labels)
    # An example at a time: the cumulative distribution of a whole batch over a large vocabulary does not fit.
    for row, uniform in enumerate(_uniforms(ids, labels.shape[1], seed)):
        sampled[row] = _sample_categorical(logits[row], uniform)
    return torch.where(labels == IGNORED, IGNORED, sampled)


def _sample_categorical(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: logits [m, C], uniforms [m] → int64 [m]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    draws = torch.searchsorted(cumulative, uniforms.to(logits.device).unsqueeze(-1)).squeeze(-1)
    return draws.clamp(max=logits.shape[-1] - 1)

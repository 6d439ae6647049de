"""Cross-entropy losses over classes and tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.tasks.draws import uniforms, wide
from adapeft.tasks.objective import IGNORED, Objective


class Classification(Objective):
    """Cross-entropy over C classes; labels int64 [n], -100 where ignored."""

    summary = "cross-entropy over the classes"

    def predicted(self, labels: Tensor) -> Tensor:
        return labels != IGNORED

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 2 and logits.shape[:1] == labels.shape

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return torch.zeros(len(ids), dtype=torch.int64)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(wide(logits), labels, ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        sampled = _sample_categorical(logits, uniforms(batch.ids, 1, seed).squeeze(1))
        return torch.where(self.predicted(batch.labels), sampled, IGNORED)


class NextToken(Objective):
    """Cross-entropy of the next token; labels int64 [n, T] as in transformers: not shifted, -100 where ignored."""

    summary = "cross-entropy of the next token, over all tokens with a label"

    def predicted(self, labels: Tensor) -> Tensor:
        predicted = labels != IGNORED
        predicted[:, :1] = False  # the first token has no context to be predicted from
        return predicted

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 3 and logits.shape[:-1] == labels.shape

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return ids.clone()

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            wide(logits)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        labels = batch.labels
        sampled = labels.clone()
        sampled[:, 1:] = _sample_tokens(logits[:, :-1], labels[:, 1:], batch.ids, seed)
        return sampled


class SequenceToSequence(Objective):
    """Cross-entropy of the decoder's tokens; labels int64 [n, T], -100 where ignored, logits [n, T, C].

    The decoder reads the true tokens before each label, also if the loss uses sampled labels.
    """

    summary = "cross-entropy of the decoder's tokens, over all tokens with a label"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        # If the batch has no decoder input, the model builds it from the labels, each model in its own way (without
        # labels BART would build it from the encoder's input). The loss that the model also computes is not used.
        with naming_examples(batch):
            return model(**batch.inputs, labels=batch.labels).logits

    def predicted(self, labels: Tensor) -> Tensor:
        return labels != IGNORED

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 3 and logits.shape[:-1] == labels.shape

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return ids.clone()

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        return _sample_tokens(logits, batch.labels, batch.ids, seed)


def _sample_tokens(logits: Tensor, labels: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Sample tokens int64 [n, T] from logits [n, T, C]; -100 where the labels are -100."""
    sampled = torch.empty_like(labels)
    # One example at a time: the cumulative distribution of a batch over a large vocabulary does not fit into memory.
    for row, uniform in enumerate(uniforms(ids, labels.shape[1], seed)):
        sampled[row] = _sample_categorical(logits[row], uniform)
    return torch.where(labels == IGNORED, IGNORED, sampled)


def _sample_categorical(logits: Tensor, draws: Tensor) -> Tensor:
    """Sample by inverse CDF: logits [m, C], draws [m] in (0, 1) → int64 [m]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(cumulative, draws.to(logits.device).unsqueeze(-1)).squeeze(-1)
    return found.clamp(max=logits.shape[-1] - 1)

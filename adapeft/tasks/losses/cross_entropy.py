"""Cross-entropy losses over classes and tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.tasks.losses.draws import uniforms, wide
from adapeft.tasks.losses.objective import IGNORED, Objective
from adapeft.tasks.losses.pieces import Tail, losses_in_pieces, num_pieces, sample_categorical
from adapeft.tasks.losses.split import pieces_of, split_of, with_decoder_inputs

_SHORTEST = 16
"""Number of tokens, from the first prediction of a batch, that suffice to check the model's own loss."""


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
        return F.cross_entropy(wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        draws = uniforms(batch.ids, batch.labels[0].numel(), seed).flatten()
        sampled = sample_categorical(logits.flatten(0, -2), draws).view(batch.labels.shape)
        return torch.where(self.predicted(batch.labels), sampled, IGNORED)


class Choices(Classification):
    """Cross-entropy over the choices of an example: logits [n, K], labels int64 [n], inputs [n, K, T]."""

    summary = "cross-entropy over the choices"

    def __init__(self, num_choices: int) -> None:
        self.num_texts = num_choices


class ImageClasses(Classification):
    """Cross-entropy over the classes of images."""

    reads_images = True


class TokenClasses(Classification):
    """Cross-entropy over C classes of every token: logits [n, T, C], labels int64 [n, T], -100 where ignored."""

    summary = "cross-entropy over the classes of the tokens with a label"

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 3 and logits.shape[:-1] == labels.shape

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return torch.zeros_like(ids)


class TokenCrossEntropy(Objective):
    """Cross-entropy of tokens: logits [n, T, C], labels int64 [n, T], -100 where ignored.

    Losses and sampled labels are computed in pieces, whose logits the backward pass computes again one after the other.
    A model that can be split gives only the logits of positions with a label, a piece at a time. Any other model gives
    all logits in its dtype, and the pieces avoid float32 copies of them.
    """

    @abstractmethod
    def targets(self, labels: Tensor) -> Tensor:
        """Return the label that is predicted at each position, int64 [n, T], -100 if none."""

    @abstractmethod
    def draws(self, batch: Batch, seed: int) -> Tensor:
        """Return the uniform draw for the label that is predicted at each position, float64 [n, T]."""

    def split_inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return the inputs of a split model, which does not get the labels."""
        return batch.inputs

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 3 and logits.shape[:-1] == labels.shape

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return ids.clone()

    def losses(
        self, model: nn.Module, batch: Batch, sample_seeds: Sequence[int | None], *, num_labels: int | None = None
    ) -> tuple[Tensor, ...]:
        """See ``Objective.losses``."""
        return tuple(one.sum() for one in self._losses(model, batch, sample_seeds, num_labels))

    def example_losses(self, model: nn.Module, batch: Batch, *, num_labels: int | None = None) -> Tensor:
        """See ``Objective.example_losses``."""
        return self._losses(model, batch, [None], num_labels)[0]

    def _losses(
        self, model: nn.Module, batch: Batch, sample_seeds: Sequence[int | None], num_labels: int | None
    ) -> tuple[Tensor, ...]:
        """Return the summed loss of each example [n] for each of the seeds, from one forward pass."""
        targets = self.targets(batch.labels)
        all_draws = [None if seed is None else self.draws(batch, seed).flatten() for seed in sample_seeds]
        split = split_of(model, num_labels or targets.numel())
        if split is None:
            logits = self.forward(model, batch).flatten(0, 1)
            with naming_examples(batch):
                pieces = num_pieces(*logits.shape)
                found = [losses_in_pieces(logits, _same, targets.flatten(), draws, pieces) for draws in all_draws]
            return tuple(batch.sums(losses.view(targets.shape)) for losses in found)
        split_model, pieces = split

        def losses_of(states: Tensor, tail: Tail) -> tuple[Tensor, ...]:
            positions = (targets != IGNORED).flatten().nonzero().squeeze(1)
            # All ranks must call the tail equally often, so every piece gets a position, if only one to be ignored.
            spare = max(0, pieces - len(positions))
            predicted = F.pad(targets.flatten()[positions], (0, spare), value=IGNORED)
            positions = F.pad(positions, (0, spare))
            chosen = states.flatten(0, 1).index_select(0, positions)
            found = []
            for draws in all_draws:
                losses = losses_in_pieces(chosen, tail, predicted, None if draws is None else draws[positions], pieces)
                every = losses.new_zeros(targets.numel()).index_add(0, positions, losses)
                found.append(batch.sums(every.view(targets.shape)))
            return tuple(found)

        with naming_examples(batch):
            return split_model.run(model, self.split_inputs(model, batch), losses_of)

    def remark(self, model: nn.Module, batch: Batch) -> str | None:
        """See ``Objective.remark``. Collective under ZeRO-3."""
        size = batch.labels.numel()
        if pieces_of(model, size) == 1 or split_of(model, size) is not None:
            return None
        return (
            f"the model cannot be split after its body, so the logits of all {size:,} positions of a micro-batch exist "
            "at once instead of in pieces"
        )

    def excerpt(self, model: nn.Module, batch: Batch) -> Batch:
        """See ``Objective.excerpt``."""
        split = split_of(model, batch.labels.numel())
        return (
            batch if split is None else _excerpt(batch, self.predicted(batch.labels), batch.labels.numel() // split[1])
        )

    def _sample_targets(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        targets = self.targets(batch.labels)
        sampled = sample_categorical(logits.flatten(0, 1), self.draws(batch, seed).flatten()).view(targets.shape)
        return torch.where(targets == IGNORED, IGNORED, sampled)


class NextToken(TokenCrossEntropy):
    """Cross-entropy of the next token; labels int64 [n, T] as in transformers: not shifted, -100 where ignored."""

    summary = "cross-entropy of the next token, over all tokens with a label"

    def predicted(self, labels: Tensor) -> Tensor:
        predicted = labels != IGNORED
        predicted[:, :1] = False  # the first token has no context to be predicted from
        return predicted

    def targets(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def draws(self, batch: Batch, seed: int) -> Tensor:
        draws = F.pad(uniforms(batch.ids, batch.labels.shape[1] - 1, seed), (0, 1), value=0.5)
        if batch.example_of is not None:
            # Those that each example would have alone: the first ones of its own stream.
            columns, example_of = batch.inputs["position_ids"].cpu(), batch.example_of.cpu()
            draws = torch.where(example_of < 0, 0.5, draws[example_of, columns])
        return draws.to(batch.labels.device)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            wide(logits)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        return torch.cat([batch.labels[:, :1], self._sample_targets(logits, batch, seed)[:, :-1]], 1)


class MaskedTokens(TokenCrossEntropy):
    """Cross-entropy of tokens at their own positions; labels int64 [n, T], -100 where ignored, logits [n, T, C]."""

    summary = "cross-entropy of the masked tokens, over all tokens with a label"

    def predicted(self, labels: Tensor) -> Tensor:
        return labels != IGNORED

    def targets(self, labels: Tensor) -> Tensor:
        return labels

    def draws(self, batch: Batch, seed: int) -> Tensor:
        return uniforms(batch.ids, batch.labels.shape[1], seed).to(batch.labels.device)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        return self._sample_targets(logits, batch, seed)


class SequenceToSequence(MaskedTokens):
    """Cross-entropy of the decoder's tokens, each at its own position of the decoder.

    The decoder reads the true tokens before each label, also if the loss uses sampled labels.
    """

    summary = "cross-entropy of the decoder's tokens, over all tokens with a label"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        # If the batch has no decoder input, the model builds it from the labels, each model in its own way (without
        # labels BART would build it from the encoder's input). The loss that the model also computes is not used.
        with naming_examples(batch):
            return model(**batch.inputs, labels=batch.labels).logits

    def split_inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        return with_decoder_inputs(model, batch.inputs, batch.labels)

    def positions(self, batch: Batch) -> Tensor:
        return self.predicted(batch.labels)


def _same(logits: Tensor) -> Tensor:
    return logits


def _excerpt(batch: Batch, predicted: Tensor, most: int) -> Batch:
    """Return the first tokens of some rows, about ``most`` in all, with some that are predicted.

    All of the batch if an input is neither one value per token nor a switch.
    """
    shape = batch.labels.shape
    tokens = {name: value for name, value in batch.inputs.items() if not isinstance(value, bool)}
    if any(getattr(value, "shape", None) != shape for value in tokens.values()):
        return batch
    first = predicted.any(0).nonzero()[0]
    num_tokens = min(shape[1], max(int(first) + _SHORTEST, most // shape[0]))
    rows = predicted[:, :num_tokens].any(1).nonzero().squeeze(1)[: max(1, most // num_tokens)]
    inputs = batch.inputs | {name: value[rows, :num_tokens] for name, value in tokens.items()}
    if batch.example_of is not None:
        return Batch(inputs, batch.labels[rows, :num_tokens], batch.ids, batch.example_of[rows, :num_tokens])
    return Batch(inputs, batch.labels[rows, :num_tokens], batch.ids[rows])

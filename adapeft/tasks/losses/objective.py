"""The interface of losses for measuring and training: the sum over predictions, and labels sampled from the model.

Sampled labels turn squared gradients into curvature: for a negative log-likelihood the Fisher matrix is the
Gauss-Newton matrix, and it is the second moment of gradients at sampled labels (Martens, "New insights and perspectives
on the natural gradient method", 2020, section 9).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from adapeft.data.refused_batch import naming_examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from adapeft.data.description import Batch

IGNORED = -100
"""Label of positions that are ignored by the loss, as in transformers."""


class MeanLoss(ABC):
    """A loss that is a mean over predictions, as measuring needs it: their sum and their number.

    Attributes:
        summary: description of the loss, for messages.
        shares_forward: whether several of ``losses`` need only one forward pass.
    """

    summary: str
    shares_forward: bool = False

    @abstractmethod
    def num_predictions(self, labels: Tensor) -> int:
        """Return the number of predictions that the loss sums over: examples, targets or tokens."""

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, *, sample_seed: int | None = None, num_labels: int | None = None
    ) -> Tensor:
        """Return the summed loss of a micro-batch. Collective under ZeRO-3.

        Args:
            model: model, or an engine around it.
            batch: micro-batch.
            sample_seed: seed of labels that are sampled from the model; None: the true labels.
            num_labels: size of the labels, or the largest of any rank; None: those of this batch, which all ranks run.
        """

    def losses(
        self, model: nn.Module, batch: Batch, sample_seeds: Sequence[int | None], *, num_labels: int | None = None
    ) -> tuple[Tensor, ...]:
        """Return the summed loss for each of ``sample_seeds``; otherwise like ``loss``."""
        return tuple(self.loss(model, batch, sample_seed=seed, num_labels=num_labels) for seed in sample_seeds)


class Objective(MeanLoss):
    """One task's loss. Shapes: logits [n, C] or [n, T, C]; labels as in ``Batch``; n examples, T tokens, C classes.

    Attributes:
        output_names: names of the fields of the model's output that hold the logits.
        num_texts: number of texts of an example, K; where there are several, the inputs are [n, K, T].
        reads_images: whether the inputs are pixels [n, channels, height, width].
    """

    shares_forward = True
    output_names: tuple[str, ...] = ("logits",)
    num_texts: int = 1
    reads_images: bool = False

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of a micro-batch, in the model's dtype."""
        with naming_examples(batch):
            return self.logits_in(model(**batch.inputs))

    def logits_in(self, output: Any) -> Tensor:
        """Return the logits in the model's output, which has the fields ``output_names``."""
        logits: Tensor = output.logits
        return logits

    def label_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the labels as inputs of the model's forward, which then computes its own loss."""
        return {"labels": labels}

    @abstractmethod
    def predicted(self, labels: Tensor) -> Tensor:
        """Return the mask of the labels that the loss sums over, bool of the labels' shape; metrics use it too."""

    def num_predictions(self, labels: Tensor) -> int:
        """See ``MeanLoss.num_predictions``."""
        return int(self.predicted(labels).sum())

    def num_outputs(self, batch: Batch, of_another: int) -> int:
        """Return the number of the model's outputs for ``batch``, given that for another batch."""
        return of_another

    def outside(self, labels: Tensor, num_outputs: int) -> Tensor:
        """Return the labels that match none of the model's ``num_outputs`` outputs, 1-D."""
        return labels[self.predicted(labels) & ((labels < 0) | (labels >= num_outputs))]

    def outputs(self, num_outputs: int) -> str:
        """Return the range of valid labels and how to write them, for the message about labels ``outside``."""
        return (
            f"the model's {num_outputs} outputs, 0 to {num_outputs - 1}. Number the classes from 0 or give a model "
            f"with more outputs; {IGNORED} marks labels to ignore"
        )

    def positions(self, batch: Batch) -> Tensor:
        """Return the mask of the positions of logits [n, T, C] that are not padding, bool [n, T]."""
        return batch.inputs["attention_mask"].bool()

    @abstractmethod
    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether logits and labels have the shapes of this loss."""

    @abstractmethod
    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        """Return labels of the right shape and dtype for inputs int64 [n, T], for counting memory."""

    def loss(
        self, model: nn.Module, batch: Batch, *, sample_seed: int | None = None, num_labels: int | None = None
    ) -> Tensor:
        """See ``MeanLoss.loss``: ``loss_sum`` of the model's logits."""
        return self.losses(model, batch, [sample_seed], num_labels=num_labels)[0]

    def losses(
        self, model: nn.Module, batch: Batch, sample_seeds: Sequence[int | None], *, num_labels: int | None = None
    ) -> tuple[Tensor, ...]:
        """See ``MeanLoss.losses``; all come from one forward pass."""
        logits = self.forward(model, batch)
        labels = [batch.labels if seed is None else self.sample_labels(logits, batch, seed) for seed in sample_seeds]
        with naming_examples(batch):
            return tuple(self.loss_sum(logits, one) for one in labels)

    def example_losses(self, model: nn.Module, batch: Batch, *, num_labels: int | None = None) -> Tensor:
        """Return the summed loss of each example [n]; arguments as for ``loss``. Collective under ZeRO-3."""
        logits = self.forward(model, batch)
        with naming_examples(batch):
            return self.losses_of(logits, batch.labels)

    def losses_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of each example [n]."""
        import torch

        rows = [slice(row, row + 1) for row in range(len(labels))]
        return torch.stack([self.loss_sum(logits[row], labels[row]) for row in rows])

    def remark(self, model: nn.Module, batch: Batch) -> str | None:
        """Return what makes the loss of such a micro-batch need more memory than usual; None if nothing does."""
        return None

    def excerpt(self, model: nn.Module, batch: Batch) -> Batch:
        """Return the part of a batch on which the model can compute its own loss within the memory of one piece."""
        return batch

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed (not averaged) loss in float32, or in float64 if the logits are."""

    @abstractmethod
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        """Sample labels from the model's distribution; the draws depend only on the example id and ``seed``."""

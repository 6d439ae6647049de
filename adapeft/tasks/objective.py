"""What a loss is to measuring and training: its sum over predictions, and labels sampled from the model.

Sampled labels turn squared gradients into curvature: for a loss that is a negative log-likelihood the Fisher matrix is
the Gauss-Newton matrix, and a gradient at sampled labels is a draw whose second moment it is (Martens, "New insights
and perspectives on the natural gradient method", 2020, section 9).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from adapeft.data.refused_batch import naming_examples

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adapeft.data.description import Batch

IGNORED = -100
"""The label of what is not to be predicted, as in transformers."""


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

    def outputs(self, num_outputs: int) -> str:
        """What labels that are ``outside`` are outside of, and how to write them."""
        return (
            f"the model's {num_outputs} outputs, 0 to {num_outputs - 1}. Number the classes from 0 or give a model "
            f"with more outputs; {IGNORED} marks what is not to be predicted"
        )

    @abstractmethod
    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether the shapes are those of this loss."""

    @abstractmethod
    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        """Labels of the right shape and type for inputs int64 [n, T], to count memory with."""

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed (not averaged) loss in float32, or in float64 where the logits are."""

    @abstractmethod
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        """Labels drawn from the model's distribution, a function of the example's id and ``seed`` alone."""

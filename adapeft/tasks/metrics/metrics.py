"""Metrics of predictions: collected batch by batch, merged over ranks, then computed on all at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from adapeft.errors import AdapeftError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


class Metrics(ABC):
    """The metrics of one kind of prediction; instances are pickled and sent between ranks.

    Attributes:
        of: name of the kind of prediction, for messages.
        higher_is_better: whether higher is better, by metric; ``auto`` means the first metric.
        reads_logits: whether predictions are kept; otherwise the metrics depend only on the mean loss, and evaluating
            need not hold the logits of a whole batch.
    """

    of: ClassVar[str]
    higher_is_better: ClassVar[Mapping[str, bool]]
    reads_logits: ClassVar[bool] = True

    def primary(self, metric: str) -> tuple[str, bool]:
        """Return the name of the primary metric, and whether higher is better.

        Args:
            metric: the config's ``data.metric``; ``auto`` selects the default metric.

        Raises:
            AdapeftError: the metric does not exist for the task.
        """
        known = self.higher_is_better
        name = next(iter(known)) if metric == "auto" else metric
        if name not in known:
            raise AdapeftError(
                f"data.metric = {metric!r} does not exist for {self.of}.{did_you_mean(metric, known)} "
                f"Choose one of auto, {', '.join(known)}."
            )
        return name, known[name]

    def predictions(self, logits: Tensor, labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions to keep of a batch of n examples and their labels, both with first dimension n.

        Args:
            logits: logits of the model, as in the task's ``Objective``.
            labels: labels of the batch.
            predicted: mask of the labels that count, from ``Objective.predicted``.
        """
        raise NotImplementedError("only called for metrics that read logits")

    @abstractmethod
    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        """Return every metric except ``loss`` by name.

        Args:
            loss: mean loss over the predictions.
            predictions: all predictions that were kept; None if none were.
            labels: labels of these predictions; None if none were kept.
        """


class Scorer:
    """Collects predictions and losses of one rank; ``merge`` adds those of other ranks, ``compute`` returns metrics.

    Metrics such as correlations are not means over batches, so all predictions are kept. Everything is on the CPU and
    can be pickled.
    """

    def __init__(self, metrics: Metrics):
        self.metrics = metrics
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._loss_sum = 0.0
        self._num_predictions = 0

    def update(self, logits: Tensor | None, labels: Tensor, loss_sum: Tensor | float, predicted: Tensor) -> None:
        """Add a batch of n examples.

        Args:
            logits: logits as in the task's ``Objective``; None if the metrics do not read them.
            labels: labels as in the task's ``Objective``.
            loss_sum: loss summed over the predictions, in nats or squared units.
            predicted: mask of the labels that count, bool of the labels' shape, from ``Objective.predicted``.
        """
        self._loss_sum += float(loss_sum)
        self._num_predictions += int(predicted.sum())
        if self.metrics.reads_logits:
            assert logits is not None
            kept, their_labels = self.metrics.predictions(logits, labels, predicted)
            self._predictions.append(kept.detach().cpu())
            self._labels.append(their_labels.detach().cpu())

    def merge(self, others: Iterable[Scorer]) -> None:
        """Add the predictions and losses of other scorers, of other ranks and other examples."""
        for other in others:
            assert other is not self, "a scorer's examples would count twice"
            self._predictions += other._predictions
            self._labels += other._labels
            self._loss_sum += other._loss_sum
            self._num_predictions += other._num_predictions

    def compute(self) -> dict[str, float]:
        """Return every metric of the task by name, the mean ``loss`` first.

        The perplexity of a loss above 709 nats is infinite, which is its worst value; all other metrics are finite.

        Raises:
            AdapeftError: a metric is not finite.
        """
        scores = self._scores()
        for name, value in scores.items():
            if math.isnan(value) or (math.isinf(value) and name != "perplexity"):
                raise AdapeftError(
                    f"the metric {name!r} is {value:g}, because the model's predictions are not finite. Train again at "
                    f"a lower learning rate, or check the base model and the evaluation data."
                )
        return scores

    def _scores(self) -> dict[str, float]:
        import torch

        assert self._num_predictions, "no predictions"
        loss = self._loss_sum / self._num_predictions
        predictions, labels = (torch.cat(kept) if kept else None for kept in (self._predictions, self._labels))
        return {"loss": loss, **self.metrics.scores(loss, predictions, labels)}

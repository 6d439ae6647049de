"""How good predictions are: accumulated batch by batch, merged over ranks, then judged all at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from adapeft.errors import AdapeftError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


class Metrics(ABC):
    """The metrics of one kind of prediction; pickled from rank to rank.

    Attributes:
        of: what is predicted, for messages.
        higher_is_better: by metric; the first is what ``auto`` means.
    """

    of: ClassVar[str]
    higher_is_better: ClassVar[Mapping[str, bool]]

    def primary(self, metric: str) -> tuple[str, bool]:
        """The metric that decides, and whether higher is better.

        Args:
            metric: the config's ``data.metric``; ``auto`` takes the usual one.

        Raises:
            AdapeftError: the metric does not exist for the task.
        """
        known = self.higher_is_better
        name = next(iter(known)) if metric == "auto" else metric
        if name not in known:
            raise AdapeftError(
                f"data.metric = {metric!r}: does not exist for {self.of}.{did_you_mean(metric, known)} "
                f"Choose auto, {', '.join(known)}."
            )
        return name, known[name]

    @abstractmethod
    def predictions(self, logits: Tensor, labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor] | None:
        """The predictions to keep of a batch of n examples and the labels that they are judged by, first axis n.

        Args:
            logits: of the model, as the task's ``Objective`` has them.
            labels: of the batch.
            predicted: which labels count, from ``Objective.predicted``.

        Returns:
            None where the mean loss says all.
        """

    @abstractmethod
    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        """Every metric but ``loss`` by name.

        Args:
            loss: mean over the predictions.
            predictions: all that were kept; None where none is.
            labels: likewise.
        """


class Scorer:
    """Collects predictions and losses of one rank; ``merge`` adds those of others, ``compute`` judges.

    Metrics such as correlations are no means over batches, so predictions are kept until all are in. Everything is on
    the CPU and can be pickled.
    """

    def __init__(self, metrics: Metrics):
        self.metrics = metrics
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._loss_sum = 0.0
        self._num_predictions = 0

    def update(self, logits: Tensor, labels: Tensor, loss_sum: Tensor | float, predicted: Tensor) -> None:
        """Adds a batch of n examples.

        Args:
            logits: as the task's ``Objective`` has them.
            labels: likewise.
            loss_sum: summed over the predictions, in nats or squared units.
            predicted: which labels these are, bool of the labels' shape; from ``Objective.predicted``.
        """
        self._loss_sum += float(loss_sum)
        self._num_predictions += int(predicted.sum())
        kept = self.metrics.predictions(logits, labels, predicted)
        if kept is not None:
            self._predictions.append(kept[0].detach().cpu())
            self._labels.append(kept[1].detach().cpu())

    def merge(self, others: Iterable[Scorer]) -> None:
        """Adds what other scorers, of other ranks and other examples, have collected."""
        for other in others:
            assert other is not self, "a scorer's examples would count twice"
            self._predictions += other._predictions
            self._labels += other._labels
            self._loss_sum += other._loss_sum
            self._num_predictions += other._num_predictions

    def compute(self) -> dict[str, float]:
        """Every metric of the task by name, the mean ``loss`` first.

        The perplexity of a loss above 709 nats is infinite, which is the worst that it can be; all others are finite.

        Raises:
            AdapeftError: names a metric that is not.
        """
        scores = self._scores()
        for name, value in scores.items():
            if math.isnan(value) or (math.isinf(value) and name != "perplexity"):
                raise AdapeftError(
                    f"the metric {name!r} is {value:g}: the model's predictions are not finite numbers, so it has no "
                    f"score. Train again at a lower learning rate, or check the base model and the evaluation data."
                )
        return scores

    def _scores(self) -> dict[str, float]:
        import torch

        assert self._num_predictions, "nothing to judge"
        loss = self._loss_sum / self._num_predictions
        predictions, labels = (torch.cat(kept) if kept else None for kept in (self._predictions, self._labels))
        return {"loss": loss, **self.metrics.scores(loss, predictions, labels)}

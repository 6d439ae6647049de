"""How good predictions are: accumulated batch by batch, merged over ranks, then judged all at once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from adapeft.data.description import DataDescription
from adapeft.errors import AdapeftError, did_you_mean

# Metric → whether higher is better, by what is predicted; the first is what 'auto' means.
_METRICS = {
    "classification": {"accuracy": True, "f1": True, "accuracy_f1": True, "matthews": True, "loss": False},
    "regression": {"pearson_spearman": True, "pearson": True, "spearman": True, "loss": False},
    "causal-lm": {"loss": False, "perplexity": False},
}


def primary(metric: str, task: str, is_regression: bool) -> tuple[str, bool]:
    """The metric that decides, and whether higher is better.

    Args:
        metric: the config's ``data.metric``; ``auto`` takes the usual one.
        task: ``sequence-classification`` or ``causal-lm``.
        is_regression: whether labels are targets.

    Raises:
        AdapeftError: the metric does not exist for the task.
    """
    kind = _kind(task, is_regression)
    known = _METRICS[kind]
    name = next(iter(known)) if metric == "auto" else metric
    if name not in known:
        raise AdapeftError(
            f"data.metric = {metric!r}: does not exist for {kind}.{did_you_mean(metric, known)} "
            f"Choose auto, {', '.join(known)}."
        )
    return name, known[name]


class Scorer:
    """Collects predictions and losses of one rank; ``merge`` adds those of others, ``compute`` judges.

    Metrics such as correlations are no means over batches, so predictions are kept until all are in: one number an
    example. A language model keeps its loss only. Everything is on the CPU and can be pickled.
    """

    def __init__(self, task: str, metric: str, description: DataDescription):
        self.primary, self.higher_is_better = primary(metric, task, description.is_regression)
        self._kind = _kind(task, description.is_regression)
        self._num_labels = description.num_labels
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._loss_sum = 0.0
        self._num_predictions = 0

    def update(self, logits: Tensor | None, labels: Tensor | None, loss_sum: Tensor | float, predicted: Tensor) -> None:
        """Adds a batch of n examples.

        Args:
            logits: [n, C] for classes; [n, 1] or [n] for targets; not read for causal-lm.
            labels: [n]; not read for causal-lm.
            loss_sum: summed over the predictions, in nats or squared units.
            predicted: which labels these are, bool [n], or [n, T] for causal-lm; from ``Objective.predicted``.
        """
        self._loss_sum += float(loss_sum)
        self._num_predictions += int(predicted.sum())
        if self._kind == "causal-lm":
            return
        assert logits is not None
        assert labels is not None
        logits, labels = logits.detach()[predicted], labels.detach()[predicted]
        is_class = self._kind == "classification"
        predictions = logits.argmax(-1) if is_class else logits.double().reshape(len(labels))
        self._predictions.append(predictions.cpu())
        self._labels.append(labels.cpu())

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
        assert self._num_predictions, "nothing to judge"
        loss = self._loss_sum / self._num_predictions
        if self._kind == "causal-lm":
            return {"loss": loss, "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item()}
        predictions, labels = torch.cat(self._predictions), torch.cat(self._labels)
        if self._kind == "regression":
            return {"loss": loss, **_correlations(predictions, labels)}
        return {"loss": loss, **_agreement(predictions, labels, self._num_labels)}


def _kind(task: str, is_regression: bool) -> str:
    if task == "causal-lm":
        return task
    return "regression" if is_regression else "classification"


def _agreement(predictions: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Of classes [N]. F1 is that of class 1 where there are two, else the mean over the classes that occur."""
    # Imported where it is used: importing it takes 3 s, which neither the command nor a measuring worker needs.
    from torchmetrics.functional.classification import (
        binary_f1_score,
        multiclass_accuracy,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
    )

    # A model whose head has more outputs than the data has classes may predict any of them.
    num_outputs = max(num_classes, int(predictions.max()) + 1)
    accuracy = multiclass_accuracy(predictions, labels, num_outputs, average="micro").item()
    if num_classes == 2:
        f1 = binary_f1_score((predictions == 1).long(), (labels == 1).long()).item()
    else:
        f1 = multiclass_f1_score(predictions, labels, num_outputs, average="macro").item()
    # A constant agrees with nothing beyond chance: 0 by convention, for which torchmetrics has several other values.
    is_constant = predictions.unique().numel() == 1 or labels.unique().numel() == 1
    matthews = 0.0 if is_constant else multiclass_matthews_corrcoef(predictions, labels, num_outputs).item()
    return {"accuracy": accuracy, "f1": f1, "accuracy_f1": (accuracy + f1) / 2, "matthews": matthews}


def _correlations(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """Of numbers [N]: Pearson's, Spearman's and their mean."""
    pearson = _correlation(predictions, targets)
    # What is not a number still gets a rank: without this, predictions that diverged would have a Spearman's.
    spearman = math.nan if math.isnan(pearson) else _correlation(_ranks(predictions), _ranks(targets))
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's of x and y [N], in float64: 0 where one is constant, nan where one is not finite."""
    from torchmetrics.functional.regression import pearson_corrcoef

    if x.unique().numel() == 1 or y.unique().numel() == 1:
        return 0.0
    return pearson_corrcoef(x.double(), y.double()).item()


def _ranks(x: Tensor) -> Tensor:
    """Ranks float64 [N] from 1; those that tie share their mean rank.

    Spearman's is Pearson's of these. torchmetrics' own sums ranks in int32, which ties among 100,000 rows overflow.
    """
    _, position, counts = x.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    return (counts.cumsum(0) - (counts - 1) / 2)[position]

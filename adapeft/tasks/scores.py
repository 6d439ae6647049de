"""Scores of predictions [N] against labels [N], of all examples at once."""

from __future__ import annotations

import math

from torch import Tensor


def agreement(predictions: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
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


def correlations(predictions: Tensor, targets: Tensor) -> dict[str, float]:
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

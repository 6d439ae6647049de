"""Scores of predictions [N] against labels [N], computed on all examples at once."""

from __future__ import annotations

import math

from torch import Tensor


def agreement(predictions: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Return accuracy, F1, their mean and Matthews correlation of classes [N].

    F1 is that of class 1 if there are two classes, otherwise the mean over the classes that occur.
    """
    # Imported here because it takes 3 s, and neither the command line nor a measuring worker needs it.
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
    # A constant does not agree beyond chance: 0 by convention, where torchmetrics returns several other values.
    is_constant = predictions.unique().numel() == 1 or labels.unique().numel() == 1
    matthews = 0.0 if is_constant else multiclass_matthews_corrcoef(predictions, labels, num_outputs).item()
    return {"accuracy": accuracy, "f1": f1, "accuracy_f1": (accuracy + f1) / 2, "matthews": matthews}


def correlations(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """Return Pearson and Spearman correlation of numbers [N], and their mean."""
    pearson = _correlation(predictions, targets)
    # NaNs still get a rank: without this check, diverged predictions would have a Spearman correlation.
    spearman = math.nan if math.isnan(pearson) else _correlation(_ranks(predictions), _ranks(targets))
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


def _correlation(x: Tensor, y: Tensor) -> float:
    """Return the Pearson correlation of x and y [N] in float64: 0 if one is constant, nan if one is not finite."""
    from torchmetrics.functional.regression import pearson_corrcoef

    if x.unique().numel() == 1 or y.unique().numel() == 1:
        return 0.0
    return pearson_corrcoef(x.double(), y.double()).item()


def _ranks(x: Tensor) -> Tensor:
    """Return ranks float64 [N] from 1; ties share their mean rank.

    Spearman correlation is the Pearson correlation of these ranks. The implementation in torchmetrics sums ranks in
    int32, which overflows for ties among 100,000 rows.
    """
    _, position, counts = x.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    return (counts.cumsum(0) - (counts - 1) / 2)[position]

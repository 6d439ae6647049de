"""Labels with one value per example: classes by name or number, or regression targets, told apart by their type."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from adapeft.data.columns import check_values
from adapeft.data.description import Labels
from adapeft.data.labels import (
    MOST_CLASSES_OF_FEW,
    Head,
    SplitLabels,
    check_names,
    kind_of,
    number_classes,
    shown,
    values_of,
)
from adapeft.errors import AdapeftError

_LARGEST = float(np.finfo(np.float32).max)


def classes_or_targets(splits: Mapping[str, datasets.Dataset], column: str, head: Head | None) -> Labels:
    """Return the classes or targets of ``data.train`` and ``data.evaluation``: floats are targets, all else classes.

    Args:
        splits: ``data.train`` and ``data.evaluation`` → rows.
        column: column of the labels.
        head: trained head of the model; None if the head is new.

    Raises:
        AdapeftError: a label is missing or of the wrong type, the labels are neither classes nor targets, or
            evaluation has classes that train does not have.
    """
    _check_labels(splits, column)
    train, evaluation = (SplitLabels.of(rows, split, column) for split, rows in splits.items())
    if _are_targets(train, evaluation, column):
        _check_head_of_targets(head)
        _warn_of_whole_targets(splits["data.train"], column)
        return Labels(None, 1, "regression")
    _check_classes(train, evaluation, column)
    if head is None or head.names is None:  # a label that is the name of an output is a class
        check_names(train, column)
    names, num_labels = number_classes(train, head, column)
    return Labels(names, num_labels, "single_label_classification")


def _check_labels(splits: Mapping[str, datasets.Dataset], column: str) -> None:
    are_targets = kind_of(splits["data.train"].features[column]) == "float"
    for split, rows in splits.items():
        check_values(
            rows,
            split,
            "data.label",
            column,
            _is_no_target if are_targets else _is_no_class,
            "not a label: a class is a name or a number from 0 on, a target is a number with a decimal point in the "
            "range of float32. Correct or drop such rows",
        )


def _is_no_class(value: Any) -> bool:
    """Return whether a label is None, a blank name, or a negative number: −1 marks unlabelled rows."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, int) and value < 0)


def _is_no_target(value: Any) -> bool:
    """Return whether a label is None or a number that is not finite in float32."""
    return value is None or (isinstance(value, int | float) and not abs(value) <= _LARGEST)


def _are_targets(train: SplitLabels, evaluation: SplitLabels, column: str) -> bool:
    """Return whether the labels are targets rather than classes."""
    if train.kind == "float" and evaluation.kind in ("float", "integer"):
        return True
    if train.described != evaluation.described and not train.kind == evaluation.kind == "string":
        raise AdapeftError(
            f"data.label = {column!r}: its type is {train.described} in data.train and {evaluation.described} in "
            "data.evaluation. Write the labels of both in the same way (whole numbers without a decimal point for "
            "classes)."
        )
    return False


def _check_head_of_targets(head: Head | None) -> None:
    if head is not None and head.num_outputs != 1:
        raise AdapeftError(
            f"data.label: targets (floats) need a head of 1 output, but {head.owner} has one of {head.num_outputs}. "
            "Name a model without a trained head, or write the labels as integers if they are classes."
        )


def _warn_of_whole_targets(rows: datasets.Dataset, column: str) -> None:
    # pandas writes the classes 0 and 1 as 0.0 and 1.0 if their column has ever held a missing value.
    targets: set[float] = set()
    for target in values_of(rows, column):
        targets.add(target)
        if not target.is_integer() or len(targets) > MOST_CLASSES_OF_FEW:
            return  # usually at the first row
    warnings.warn(
        f"data.label = {column!r}: the floats in data.train are targets of a regression, though all of them are whole "
        f"numbers ({shown(sorted(targets))}). Write them without a decimal point if they are classes.",
        stacklevel=3,
    )


def _check_classes(train: SplitLabels, evaluation: SplitLabels, column: str) -> None:
    if len(train.counts) < 2:
        raise AdapeftError(
            f"data.label = {column!r}: every row of data.train has the label {next(iter(train.counts))!r}. Give at "
            "least two classes (or floats, with a decimal point, for regression)."
        )
    check_spelling(train, column)
    check_spelling(evaluation, column)
    check_known(train, evaluation, column)


def check_spelling(labels: SplitLabels, column: str) -> None:
    """Check that no two names differ only by spaces around them.

    Raises:
        AdapeftError: two of them do.
    """
    spelled: dict[str, str] = {}
    for name in labels.declared or map(str, labels.counts):
        other = spelled.setdefault(name.strip(), name)
        if other != name:
            raise AdapeftError(
                f"data.label = {column!r}: {labels.split} has the labels {min(name, other)!r} and "
                f"{max(name, other)!r}, which differ only by spaces. Write them in the same way."
            )


def check_known(train: SplitLabels, evaluation: SplitLabels, column: str) -> None:
    """Check that the training data has every label of the evaluation data.

    Raises:
        AdapeftError: it lacks some.
    """
    unknown = sorted(label for label in evaluation.counts if label not in train.counts)
    if unknown:
        num_rows = sum(evaluation.counts[label] for label in unknown)
        raise AdapeftError(
            f"data.label = {column!r}: data.evaluation has labels that data.train does not: "
            f"{', '.join(map(repr, unknown[:20]))}{' …' * (len(unknown) > 20)} "
            f"({num_rows} of {sum(evaluation.counts.values())} rows). Add such rows to data.train or drop them."
        )

"""Examples as they arrive: checked and described before anything is trained on them, and batches of them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from adapeft.data.content import rows_hash
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
from adapeft.data.sources import load_rows, num_lines, rows_of
from adapeft.errors import AdapeftError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adapeft.sections.data import Data

_LARGEST = float(np.finfo(np.float32).max)

__all__ = ["Batch", "DataDescription", "describe", "load_rows"]


@dataclass(frozen=True)
class DataDescription:
    """What a model has to know of its data.

    ``label_names`` are the classes in the order of their numbers, or None where labels are numbers already (integers
    are their own class, floats are targets) or where there are none. ``num_labels`` is how many outputs the model's
    head needs: the classes, 1 for regression, 0 for a language model, which has its own.

    By ``data.train`` and ``data.evaluation``: ``lines`` that ``num_lines`` has counted, and the ``content`` that was
    read, hashed. Two descriptions are equal whatever these are.
    """

    num_train: int
    num_evaluation: int
    label_names: tuple[str, ...] | None
    is_regression: bool
    num_labels: int
    lines: Mapping[str, int | None] = dataclasses.field(default_factory=dict, compare=False)
    content: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Batch:
    """Examples side by side: n examples, T tokens after padding.

    ``inputs``: keyword arguments of the model's forward (``input_ids``, ``attention_mask`` … int64 [n, T]); those that
    are no tensors, such as ``max_length_q``, are shared by all examples. ``labels``: classes int64 [n], targets float32
    [n] or, for a language model, its own tokens int64 [n, T], not shifted, −100 on padding. ``ids``: int64 [n], where
    each example stands in its data set; whatever is drawn at random for an example is seeded by it, so that no batching
    changes the draw.
    """

    inputs: dict[str, Any]
    labels: Tensor
    ids: Tensor

    def example(self, index: int) -> Batch:
        """One of the examples, with the batch's padding.

        Raises:
            AdapeftError: a tensor among the inputs is not divided by example.
        """
        num_examples = len(self.labels)
        if num_examples == 1:
            return self
        one = slice(index, index + 1)
        inputs = {}
        for name, value in self.inputs.items():
            if hasattr(value, "shape") and value.shape[:1] != (num_examples,):
                raise AdapeftError(
                    f"{name!r} of shape {list(value.shape)} cannot be divided into the {num_examples} examples of its "
                    "batch. Give batches of one example each."
                )
            inputs[name] = value[one] if hasattr(value, "shape") else value
        return Batch(inputs, self.labels[one], self.ids[one])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.ids.to(device))


def describe(data: Data, task: str, head: Head | None = None) -> DataDescription:
    """Reads both sources, checks every text and label of theirs, and says what they hold.

    Args:
        data: the config's section.
        task: ``sequence-classification`` or ``causal-lm``.
        head: the trained head that the labels are for; None where it is new.

    Raises:
        AdapeftError: a column is missing or is named twice, a text or label is missing or of the wrong type, labels do
            not form classes or targets, or evaluation has classes that train does not.
    """
    columns = _columns(data, task)
    splits = {split: rows_of(data, split) for split in ("data.train", "data.evaluation")}
    for split, rows in splits.items():
        _check_texts(rows, split, data, task)
        if task != "causal-lm":
            _check_column(rows, split, "data.label", data.label)
    label_names, is_regression, num_labels = None, False, 0
    if task != "causal-lm":
        _check_labels(splits, data)
        train, evaluation = (SplitLabels.of(rows, split, data.label) for split, rows in splits.items())
        is_regression = _is_regression(train, evaluation, data.label)
        if is_regression:
            num_labels = 1
            _check_head_of_targets(head)
            _warn_of_whole_targets(splits["data.train"], data.label)
        else:
            _check_classes(train, evaluation, data.label)
            if head is None or head.names is None:  # what has a name is one
                check_names(train, data.label)
            label_names, num_labels = number_classes(train, head, data.label)
    return DataDescription(
        len(splits["data.train"]),
        len(splits["data.evaluation"]),
        label_names,
        is_regression,
        num_labels,
        lines={"data.train": num_lines(data.train), "data.evaluation": num_lines(data.evaluation)},
        content={split: rows_hash(rows, columns) for split, rows in splits.items()},
    )


def _columns(data: Data, task: str) -> list[str]:
    """The columns that are read.

    Raises:
        AdapeftError: one of them is named twice: labels that stand in the text would be predicted without any training.
    """
    fields: dict[str, str] = {}
    for field in ("text", "text_pair", *(() if task == "causal-lm" else ("label",))):
        column = getattr(data, field)
        if column in fields:
            raise AdapeftError(f"data.{field} = {column!r}: is also data.{fields[column]}. Name another column.")
        if column is not None:
            fields[column] = field
    return list(fields)


def _check_texts(rows: datasets.Dataset, split: str, data: Data, task: str) -> None:
    if task == "causal-lm" and data.text_pair is not None:
        raise AdapeftError(f"data.text_pair = {data.text_pair!r}: causal-lm reads one text. Set it to null.")
    for field, column in (("data.text", data.text), ("data.text_pair", data.text_pair)):
        if column is not None:
            _check_column(rows, split, field, column)
            _check_values(rows, split, field, column, _is_no_text, "not a text. Correct or drop such rows")


def _check_column(rows: datasets.Dataset, split: str, field: str, column: str) -> None:
    if column not in rows.column_names:
        raise AdapeftError(
            f"{field} = {column!r}: {split} has no such column.{did_you_mean(column, rows.column_names)} "
            f"It has {', '.join(map(repr, rows.column_names))}."
        )


def _check_values(
    rows: datasets.Dataset, split: str, field: str, column: str, is_bad: Callable[[Any], bool], complaint: str
) -> None:
    bad = [(row, value) for row, value in enumerate(values_of(rows, column)) if is_bad(value)]
    if bad:
        row, value = bad[0]
        raise AdapeftError(
            f"{field} = {column!r}: row {row} of {split} (counted from 0) has {value!r}, {complaint} "
            f"({len(bad)} of {len(rows)})."
        )


def _is_no_text(value: Any) -> bool:
    return not isinstance(value, str)


def _check_labels(splits: Mapping[str, datasets.Dataset], data: Data) -> None:
    are_targets = kind_of(splits["data.train"].features[data.label]) == "float"
    for split, rows in splits.items():
        _check_values(
            rows,
            split,
            "data.label",
            data.label,
            _is_no_target if are_targets else _is_no_class,
            "not a label: a class is a name or a number from 0 on, a target a number with a decimal point that float32 "
            "can hold. Correct or drop such rows",
        )


def _is_no_class(value: Any) -> bool:
    """None, blank names, and negative numbers: −1 is how unlabelled rows are marked."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, int) and value < 0)


def _is_no_target(value: Any) -> bool:
    """None, and numbers that are not finite in float32."""
    return value is None or (isinstance(value, int | float) and not abs(value) <= _LARGEST)


def _is_regression(train: SplitLabels, evaluation: SplitLabels, column: str) -> bool:
    """Whether the labels are targets rather than classes."""
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
            "Name a model without a head of its own, or write the labels as integers if they are classes."
        )


def _warn_of_whole_targets(rows: datasets.Dataset, column: str) -> None:
    # pandas writes the classes 0 and 1 as 0.0 and 1.0 once their column has held a missing value.
    targets: set[float] = set()
    for target in values_of(rows, column):
        targets.add(target)
        if not target.is_integer() or len(targets) > MOST_CLASSES_OF_FEW:
            return  # most often at the first row
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
    for labels in (train, evaluation):
        names = labels.declared or sorted(map(str, labels.counts))
        alike = [name for name in names if name != name.strip() and name.strip() in names]
        if alike:
            raise AdapeftError(
                f"data.label = {column!r}: {labels.split} has the labels {alike[0]!r} and {alike[0].strip()!r}, which "
                "differ by spaces alone. Write them in the same way."
            )
    unknown = sorted(label for label in evaluation.counts if label not in train.counts)
    if unknown:
        num_rows = sum(evaluation.counts[label] for label in unknown)
        raise AdapeftError(
            f"data.label = {column!r}: data.evaluation has labels that data.train does not: "
            f"{', '.join(map(repr, unknown[:20]))}{' …' * (len(unknown) > 20)} "
            f"({num_rows} of {sum(evaluation.counts.values())} rows). Add such rows to data.train or drop them."
        )

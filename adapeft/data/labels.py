"""Matching of labels with the outputs of a head: by name, and by number only if there are no names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from adapeft.errors import AdapeftError

MOST_CLASSES = 2**15
"""More distinct labels than this are taken for ids or texts; the largest sets of classes in use have about 20,000."""
MOST_CLASSES_OF_FEW = 50
"""Up to this number of classes, one example per class is enough; beyond, at least two on average are needed."""

_GENERIC = re.compile(r"LABEL_\d+")
_NUMERAL = re.compile(r"-?(0|[1-9]\d*)")
# Numbers with a decimal comma, a plus, a per cent sign or separated thousands; and marks of missing values.
_WRITTEN_NUMBER = re.compile(r"[+-]?(\d{1,3}([,. ]\d{3})+|\d+)?([.,]\d*)?([eE][+-]?\d+)?\s*%?")
_WRITTEN_INTEGER = re.compile(r"[+-]?\d+")
_MISSING = {"na", "n/a", "#n/a", "<na>", "nan", "null", "none", "-", "?", "."}


@dataclass(frozen=True)
class Head:
    """A trained head: ``num_outputs``, and the ``names`` of its outputs in order, or None if they have only numbers."""

    num_outputs: int
    names: tuple[str, ...] | None
    owner: str = "model.name"

    @classmethod
    def of_labels(cls, id2label: Mapping[Any, str], owner: str = "model.name") -> Head:
        """Return the head that a config's ``id2label`` describes; the defaults ``LABEL_0`` … do not count as names."""
        names = {int(number): str(name) for number, name in id2label.items()}
        num_labels = len(names)
        if sorted(names) != list(range(num_labels)) or len(set(names.values())) < num_labels:
            return cls(num_labels, None, owner)
        ordered = tuple(names[number] for number in range(num_labels))
        return cls(num_labels, None if all(map(_GENERIC.fullmatch, ordered)) else ordered, owner)


@dataclass(frozen=True)
class SplitLabels:
    """The labels of a split.

    Attributes:
        split: ``data.train`` or ``data.evaluation``.
        kind: ``integer``, ``boolean``, ``string`` (named classes are strings, whatever numbers they have) or ``float``.
        declared: the names of a ``ClassLabel`` in the order of its numbers, None for other columns.
        counts: label → number of rows; the label of a named class is its name.
    """

    split: str
    kind: str
    declared: tuple[str, ...] | None
    counts: Mapping[Any, int]

    @property
    def described(self) -> str:
        return self.kind if self.declared is None else "named classes"

    @classmethod
    def of(cls, rows: datasets.Dataset, split: str, column: str) -> SplitLabels:
        """Count the labels in ``column``.

        Raises:
            AdapeftError: they are neither classes nor targets.
        """
        feature = rows.features[column]
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
            numbers = Counter(values_of(rows, column))
            if (most := max(numbers, default=0)) >= len(names):
                raise AdapeftError(
                    f"data.label = {column!r}: {split} has the class number {most}, but names for {len(names)} classes "
                    f"({shown(names)}). Correct the names or the numbers."
                )
            return cls(split, "string", names, {names[number]: count for number, count in numbers.items()})
        if (kind := kind_of(feature)) is None:
            raise AdapeftError(
                f"data.label = {column!r}: {split} holds {_held(rows, column)} in this column. Labels have to be all "
                "integers, all booleans or all strings (classes), or all floats (targets)."
            )
        return cls(split, kind, None, {} if kind == "float" else Counter(values_of(rows, column)))


_KINDS = (("integer", "u?int"), ("boolean", "bool"), ("string", "(large_)?string"), ("float", "float"))


def kind_of(feature: Any) -> str | None:
    """Return the kind of labels in a column, as in ``SplitLabels``; None if its type cannot be a label."""
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    return next((kind for kind, pattern in _KINDS if re.match(pattern, dtype)), None)


def check_names(labels: SplitLabels, column: str) -> None:
    """Check that string labels are names of classes.

    Raises:
        AdapeftError: all are numbers of which some are not integers, so probably targets; or all are numbers except
            marks of missing values.
    """
    if labels.kind != "string" or labels.declared is not None:
        return
    names = {name: name.strip() for name in labels.counts}
    marks = [name for name, text in names.items() if text.casefold() in _MISSING]
    numbers = [text for name, text in names.items() if name not in marks]
    if not numbers or not all(any(map(str.isdigit, text)) and _WRITTEN_NUMBER.fullmatch(text) for text in numbers):
        return
    if marks:
        raise AdapeftError(
            f"data.label = {column!r}: {labels.split} has {marks[0]!r} in {labels.counts[marks[0]]} rows, and numbers "
            f"in all others ({shown(sorted(numbers))}), so that this mark would become a class. Drop such rows, or "
            "name the classes by words."
        )
    fractions = [text for text in sorted(numbers) if not _WRITTEN_INTEGER.fullmatch(text)]
    if fractions:
        raise AdapeftError(
            f"data.label = {column!r}: the labels of {labels.split} are numbers written as strings, such as "
            f"{fractions[0]!r}, and each would become a class. Write targets as numbers (without quotes in JSON, with "
            "a decimal point, without '+', '%' or commas), or name the classes by words."
        )


def number_classes(train: SplitLabels, head: Head | None, column: str) -> tuple[tuple[str, ...] | None, int]:
    """Return the names of the classes in the order of their numbers, and the number of outputs.

    Without a trained head, the names of a ``ClassLabel`` keep their order, integers 0 … C − 1 are class numbers (no
    names, None), and all other labels are numbered in sorted order and are their own names. With a trained head, a
    label belongs to the output of its name, ignoring case if necessary; integers are class numbers unless the head's
    names are numerals; and if the head has no names, the labels have to be numbers.

    Raises:
        AdapeftError: there are too many distinct labels for classes, or they disagree with the head. Names both sides.
    """
    if head is None:
        return _of_new_head(train, column)
    if head.num_outputs == 1:
        raise AdapeftError(
            f"data.label = {column!r}: {len(train.counts)} classes, but the head of {head.owner} has 1 output, for "
            "targets. Name a model without a trained head, or write the labels as floats if they are targets."
        )
    if train.kind == "integer" and not (head.names and all(map(_NUMERAL.fullmatch, head.names))):
        return _by_number(max(train.counts) + 1, None, head, train, column)
    labels = train.declared or tuple(map(str, train.counts))
    names = head.names or tuple(f"LABEL_{number}" for number in range(head.num_outputs))
    ordered = _matched(labels, names)
    if ordered is not None:
        return ordered, head.num_outputs
    if head.names is None and train.declared is not None:
        return _by_number(len(train.declared), train.declared, head, train, column)
    if head.names is None and train.kind == "boolean":
        return _by_number(2, ("False", "True"), head, train, column)
    if head.names is None:
        outputs = f"{head.num_outputs} outputs without names"
        remedy = "the numbers of its outputs, or put their names into label2id and id2label of its config.json"
    else:
        outputs, remedy = shown(head.names), "these names"
    raise AdapeftError(
        f"data.label = {column!r}: data.train has the classes {shown(labels)}, but the head of {head.owner} has "
        f"{outputs}. Write the labels as {remedy}, or name a model without a trained head."
    )


def class_numbers(rows: datasets.Dataset, column: str, names: Sequence[str] | None) -> list[int]:
    """Return the class number of every row, its index in ``names``; a ``ClassLabel`` is matched by name, not number."""
    return list(map(numbering(rows.features[column], names), values_of(rows, column)))


def numbering(feature: Any, names: Sequence[str] | None) -> Callable[[Any], int]:
    """Return the function of a label that gives its class number, its index in ``names``.

    Args:
        feature: type of the labels in ``datasets``; those of a ``ClassLabel`` are matched by name, not number.
        names: names of the classes; None: labels are class numbers.
    """
    if names is None:
        return int
    numbers = {name: number for number, name in enumerate(names)}
    if isinstance(feature, datasets.ClassLabel):
        return [numbers.get(name, -1) for name in feature.names].__getitem__
    if all(map(_NUMERAL.fullmatch, names)):
        return lambda label: numbers[str(label)]
    return lambda label: label if type(label) is int else numbers[str(label)]


def values_of(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """Yield the values of a column without decoding: ``datasets`` would open the image or audio file of every row."""
    is_json = isinstance(rows.features[column], datasets.Json)
    for batch in rows.select_columns(column).with_format("arrow").iter(batch_size=1000):
        values = batch[column].to_pylist()
        yield from (value if value is None else json.loads(value) for value in values) if is_json else values


def shown(names: Sequence[Any]) -> str:
    """Return the first names as text."""
    listed = ", ".join(map(repr, names[:8]))
    return listed if len(names) <= 8 else f"{listed} … ({len(names)} classes)"


def _of_new_head(train: SplitLabels, column: str) -> tuple[tuple[str, ...] | None, int]:
    labels, num_rows = sorted(train.counts), sum(train.counts.values())
    if train.declared is not None:
        return train.declared, len(train.declared)
    num_classes = len(labels)
    if num_classes > MOST_CLASSES or (num_classes > MOST_CLASSES_OF_FEW and 2 * num_classes > num_rows):
        raise AdapeftError(
            f"data.label = {column!r}: {num_classes} distinct labels in the {num_rows} rows of data.train "
            f"({shown(labels)}) are ids or texts rather than classes. There may be at most {MOST_CLASSES} classes, and "
            f"more than {MOST_CLASSES_OF_FEW} need at least two examples each on average. Name the column of the "
            "classes, or write targets as floats, with a decimal point."
        )
    if train.kind == "integer" and labels == list(range(num_classes)):
        return None, num_classes
    return tuple(map(str, labels)), num_classes


def _by_number(
    num_classes: int, names: tuple[str, ...] | None, head: Head, train: SplitLabels, column: str
) -> tuple[tuple[str, ...] | None, int]:
    """Return classes that are numbered like the head's outputs.

    Raises:
        AdapeftError: the number of classes is not the number of outputs.
    """
    if num_classes != head.num_outputs:
        outputs = "" if head.names is None else f" ({shown(head.names)})"
        raise AdapeftError(
            f"data.label = {column!r}: {num_classes} classes, but the head of {head.owner} has {head.num_outputs} "
            f"outputs{outputs}, and data.train has the labels {shown(sorted(train.counts))}. Write the labels as the "
            f"names of its outputs or number them from 0 to {head.num_outputs - 1}, or name a model without a trained "
            "head."
        )
    return names, num_classes


def _matched(labels: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return ``names`` in the case of the labels; None if a label has no name, or two differ only by case."""
    if set(labels) <= set(names):
        return names
    spelled = {label.casefold(): label for label in labels}
    known = {name.casefold() for name in names}
    if len(spelled) < len(labels) or len(known) < len(names) or not spelled.keys() <= known:
        return None
    return tuple(spelled.get(name.casefold(), name) for name in names)


def _held(rows: datasets.Dataset, column: str) -> str:
    """Describe a column that does not hold labels: its type, and the first rows of two different types."""
    feature = str(rows.features[column])
    if not isinstance(rows.features[column], datasets.Json):
        return feature
    first: dict[str, str] = {}
    for row, value in enumerate(values_of(rows, column)):
        first.setdefault(type(value).__name__, f"{repr(value)[:40]} in row {row}")
    return f"{feature}, {' and '.join(list(first.values())[:2])} (counted from 0)"

"""Which output of a head a label belongs to: names decide, and numbers only where there are no names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from adapeft.errors import AdapeftError

MOST_CLASSES = 2**15
"""More distinct labels than this are ids or texts; the largest sets of classes in use have about 20,000."""
MOST_CLASSES_OF_FEW = 50
"""Up to as many classes, any number of examples of each is plausible; beyond, two of each on average are needed."""

_GENERIC = re.compile(r"LABEL_\d+")
_NUMERAL = re.compile(r"-?(0|[1-9]\d*)")
# Numbers as people write them, with a decimal comma, a plus or a per cent sign or divided thousands; and how they mark
# that there is none.
_WRITTEN_NUMBER = re.compile(r"[+-]?(\d{1,3}([,. ]\d{3})+|\d+)?([.,]\d*)?([eE][+-]?\d+)?\s*%?")
_WRITTEN_INTEGER = re.compile(r"[+-]?\d+")
_MISSING = {"na", "n/a", "#n/a", "<na>", "nan", "null", "none", "-", "?", "."}


@dataclass(frozen=True)
class Head:
    """A trained head: ``num_outputs``, and their ``names`` in order, or None where it has only numbers."""

    num_outputs: int
    names: tuple[str, ...] | None
    owner: str = "model.name"

    @classmethod
    def of_labels(cls, id2label: Mapping[Any, str], owner: str = "model.name") -> Head:
        """The head that a config's ``id2label`` describes; transformers' own ``LABEL_0`` … are no names."""
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
        counts: how many rows have each label; the label of a named class is its name.
    """

    split: str
    kind: str
    declared: tuple[str, ...] | None
    counts: Mapping[Any, int]

    @property
    def described(self) -> str:
        """The kind in words."""
        return self.kind if self.declared is None else "named classes"

    @classmethod
    def of(cls, rows: datasets.Dataset, split: str, column: str) -> SplitLabels:
        """Those in ``column``.

        Raises:
            AdapeftError: they are neither classes nor targets.
        """
        feature = rows.features[column]
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
            numbers = Counter(values_of(rows, column))
            if (most := max(numbers, default=0)) >= len(names):
                raise AdapeftError(
                    f"data.label = {column!r}: {split} has the class number {most}, and names for {len(names)} classes "
                    f"({shown(names)}). Correct the names or the numbers."
                )
            return cls(split, "string", names, {names[number]: count for number, count in numbers.items()})
        if (kind := kind_of(feature)) is None:
            raise AdapeftError(
                f"data.label = {column!r}: {split} holds {_held(rows, column)} in it. Labels are integers, booleans or "
                "strings (classes) or floats (targets), of one type throughout."
            )
        return cls(split, kind, None, {} if kind == "float" else Counter(values_of(rows, column)))


_KINDS = (("integer", "u?int"), ("boolean", "bool"), ("string", "(large_)?string"), ("float", "float"))


def kind_of(feature: Any) -> str | None:
    """The kind of label that a column of plain values holds, as in ``SplitLabels``; None where they are no labels."""
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    return next((kind for kind, pattern in _KINDS if re.match(pattern, dtype)), None)


def check_names(labels: SplitLabels, column: str) -> None:
    """Checks that texts are names, not numbers that were meant as targets, nor the mark of a missing one among numbers.

    Raises:
        AdapeftError: they are such.
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
            f"in all others ({shown(sorted(numbers))}), so that it would be a class like them. Drop such rows, or name "
            "the classes by words."
        )
    fractions = [text for text in sorted(numbers) if not _WRITTEN_INTEGER.fullmatch(text)]
    if fractions:
        raise AdapeftError(
            f"data.label = {column!r}: the labels of {labels.split} are numbers written as texts, such as "
            f"{fractions[0]!r}, and each would be a class. Write targets as numbers (without quotes in JSON, with a "
            "decimal point, without '+', '%' or commas), or name the classes by words."
        )


def number_classes(train: SplitLabels, head: Head | None, column: str) -> tuple[tuple[str, ...] | None, int]:
    """The classes in the order of their numbers, and how many outputs they take.

    Without a trained head the names of a ``ClassLabel`` keep their order, integers that are 0 … C − 1 are their own
    numbers (no names, None), and all other labels are numbered in sorted order and named by themselves. With one, a
    label is the output of its name, in any case of letters if need be; integers are numbers, unless the head's names
    are numerals; and where the head has only numbers, so must the data.

    Raises:
        AdapeftError: too many classes to be any, or they disagree with the head; names both sides.
    """
    if head is None:
        return _of_new_head(train, column)
    if head.num_outputs == 1:
        raise AdapeftError(
            f"data.label = {column!r}: {len(train.counts)} classes, but the head of {head.owner} has 1 output, for "
            "targets. Name a model without a head of its own, or write the labels as floats if they are targets."
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
        f"{outputs}. Write the labels as {remedy}, or name a model without a head of its own."
    )


def class_numbers(rows: datasets.Dataset, column: str, names: Sequence[str] | None) -> list[int]:
    """The number of every row's class among ``names``; a named class is found by its name, whatever its number here."""
    feature = rows.features[column]
    values = list(values_of(rows, column))
    if names is None:
        return [int(value) for value in values]
    numbers = {name: number for number, name in enumerate(names)}
    if isinstance(feature, datasets.ClassLabel):
        of_number = [numbers.get(name, -1) for name in feature.names]
        return [of_number[value] for value in values]
    if values and type(values[0]) is int and not all(map(_NUMERAL.fullmatch, names)):
        return values
    return [numbers[str(value)] for value in values]


def values_of(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """The values of a column, none decoded: ``datasets`` opens whatever file a row names as its image or sound."""
    is_json = isinstance(rows.features[column], datasets.Json)
    for batch in rows.select_columns(column).with_format("arrow").iter(batch_size=1000):
        values = batch[column].to_pylist()
        yield from (value if value is None else json.loads(value) for value in values) if is_json else values


def shown(names: Sequence[Any]) -> str:
    """A few of the names."""
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
            f"({shown(labels)}) are ids or texts rather than classes, of which there are at most {MOST_CLASSES}, and "
            f"beyond {MOST_CLASSES_OF_FEW} with two examples each on average. Name the column of the classes, or write "
            "targets as floats, with a decimal point."
        )
    if train.kind == "integer" and labels == list(range(num_classes)):
        return None, num_classes
    return tuple(map(str, labels)), num_classes


def _by_number(
    num_classes: int, names: tuple[str, ...] | None, head: Head, train: SplitLabels, column: str
) -> tuple[tuple[str, ...] | None, int]:
    """Classes whose numbers are those of the head's outputs, of which they have to be all."""
    if num_classes != head.num_outputs:
        outputs = "" if head.names is None else f" ({shown(head.names)})"
        raise AdapeftError(
            f"data.label = {column!r}: {num_classes} classes, but the head of {head.owner} has {head.num_outputs} "
            f"outputs{outputs}, and data.train has the labels {shown(sorted(train.counts))}. Write the labels as the "
            f"names of its outputs or number them from 0 to {head.num_outputs - 1}, or name a model without a head of "
            "its own."
        )
    return names, num_classes


def _matched(labels: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """``names`` as the labels spell them; None where a label has none, or two are the same in another case."""
    if set(labels) <= set(names):
        return names
    spelled = {label.casefold(): label for label in labels}
    known = {name.casefold() for name in names}
    if len(spelled) < len(labels) or len(known) < len(names) or not spelled.keys() <= known:
        return None
    return tuple(spelled.get(name.casefold(), name) for name in names)


def _held(rows: datasets.Dataset, column: str) -> str:
    """What a column that holds no labels holds, with the first two rows that differ in type."""
    feature = str(rows.features[column])
    if not isinstance(rows.features[column], datasets.Json):
        return feature
    first: dict[str, str] = {}
    for row, value in enumerate(values_of(rows, column)):
        first.setdefault(type(value).__name__, f"{repr(value)[:40]} in row {row}")
    return f"{feature}, {' and '.join(list(first.values())[:2])} (counted from 0)"

"""Checks of columns and their values; errors name the config's key, the row and the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets

from adapeft.data.labels import values_of
from adapeft.data.streams import Rows
from adapeft.errors import AdapeftError, did_you_mean
from adapeft.sections.data import Data


def named_columns(data: Data) -> list[str]:
    """Return the columns that the config names.

    Raises:
        AdapeftError: a column is named twice. A label that is also part of the text could be predicted without
            training.
    """
    fields: dict[str, str] = {}
    pairs = [*data.text_columns.items(), *data.image_columns.items()]
    pairs += [(field, column) for field, columns in data.label_columns.items() for column in columns]
    for field, column in pairs:
        if column in fields:
            raise AdapeftError(f"data.{field} = {column!r}: is also data.{fields[column]}. Name another column.")
        fields[column] = field
    return list(fields)


def check_texts(rows: datasets.Dataset, split: str, data: Data) -> None:
    """Check that the columns of texts exist and hold only strings."""
    for field, column in data.text_columns.items():
        check_column(rows, split, f"data.{field}", column)
        check_values(rows, split, f"data.{field}", column, _is_no_text, "not a text. Correct or drop such rows")


def check_column(rows: Rows, split: str, field: str, column: str) -> None:
    if column not in rows.column_names:
        raise AdapeftError(
            f"{field} = {column!r}: {split} has no such column.{did_you_mean(column, rows.column_names)} "
            f"It has {', '.join(map(repr, rows.column_names))}."
        )


def check_values(
    rows: datasets.Dataset, split: str, field: str, column: str, is_bad: Callable[[Any], bool], complaint: str
) -> None:
    """Check that no value of the column is bad.

    Raises:
        AdapeftError: some are; the message ends with ``complaint``, which includes the remedy.
    """
    bad = [(row, value) for row, value in enumerate(values_of(rows, column)) if is_bad(value)]
    if bad:
        row, value = bad[0]
        raise AdapeftError(
            f"{field} = {column!r}: row {row} of {split} (counted from 0) has {value!r}, {complaint} "
            f"({len(bad)} of {len(rows)})."
        )


def _is_no_text(value: Any) -> bool:
    return not isinstance(value, str)

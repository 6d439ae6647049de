"""Readers of CSV, TSV and JSON files that infer types from whole columns, so that no value changes.

The builders of ``datasets`` infer types chunk by chunk: texts such as '007', '1e5' or '2024-01-01' become numbers and
dates, and a column whose first chunk holds numbers cannot hold words later.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow as pa
import pyarrow.compute as pc

# Type of a column of a CSV or TSV that is not configured as text: that of the first pattern that every cell matches,
# else string. '01' is a string, because numbers are not written with leading zeros.
_INTEGER = r"^-?(0|[1-9][0-9]*)$"
_FLOAT = r"^(-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|NaN|inf|Infinity))$"
_BOOLEAN = r"^(True|False|true|false|TRUE|FALSE)$"

_CHUNK = 65_536
_STREAMED_CHUNK = 1000


def read_csv(path: Path, texts: Collection[str]) -> datasets.Dataset:
    """Read a comma-separated file (RFC 4180), or a tab-separated one, in which quotes have no meaning.

    Blank lines are skipped, empty cells are missing values, and columns without a name are left out.

    Args:
        path: file in UTF-8, with or without a byte order mark; ``.tsv`` is tab-separated, any other suffix is CSV.
        texts: columns that stay strings; the types of all others are inferred from all their cells.

    Raises:
        ValueError: a line has more or fewer cells than the first one, a quote is not closed, two columns have the same
            name, or a TSV has CSV quoting. Names the line or the column.
    """
    with _table(path) as (header, rows):
        chunks: dict[str, list[pa.Array]] = {name: [] for name in header if name}
        for rows_of_chunk in _chunked(rows):
            for name, cells in zip(header, zip(*rows_of_chunk, strict=True), strict=True):
                if name:
                    chunks[name].append(pa.array([cell or None for cell in cells], pa.string()))
    columns = {name: pa.chunked_array(arrays, pa.string()) for name, arrays in chunks.items()}
    if _is_tsv(path):
        for name, column in columns.items():
            _check_unquoted(name, column)
    return datasets.Dataset(
        pa.table({name: column if name in texts else _typed(column) for name, column in columns.items()})
    )


def stream_csv(path: Path) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a file that ``read_csv`` reads, one by one, with all values as texts.

    Raises:
        ValueError: as ``read_csv``; the quoting of a TSV is judged by its first rows.
    """
    with _table(path) as (header, rows):
        for number, rows_of_chunk in enumerate(_chunked(rows, _STREAMED_CHUNK)):
            if number == 0 and _is_tsv(path):
                for name, column in zip(header, zip(*rows_of_chunk, strict=True), strict=True):
                    _check_unquoted(name, pa.chunked_array([pa.array(column, pa.string())]))
            for cells in rows_of_chunk:
                yield {name: cell or None for name, cell in zip(header, cells, strict=True) if name}


def read_json(path: Path) -> datasets.Dataset:
    """Read a JSON file: one object per line, an array of objects, or one object of columns.

    Strings stay strings. A column of integers and floats has floats; one of any other mixture is ``datasets.Json``,
    which preserves every value.

    Raises:
        ValueError: a row is not an object, or a field occurs twice in an object. Names the row or the field.
    """
    with path.open(encoding="utf-8-sig") as file:
        return table_of(_checked(_objects(file, path.suffix.lower() == ".json")))


def stream_json(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with one JSON object per line, one by one.

    Raises:
        ValueError: as ``read_json``.
    """
    with path.open(encoding="utf-8-sig") as file:
        yield from _checked(_lines(file))


def table_of(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """Return rows of JSON values in memory, with the types that ``read_json`` infers."""
    columns: dict[str, list[Any]] = {}
    for count, row in enumerate(rows):
        for name in row:
            if name not in columns:
                columns[name] = [None] * count
        for name, values in columns.items():
            values.append(row.get(name))
    found = {name: _column(values) for name, values in columns.items()}
    features = datasets.Features({name: feature for name, (_, feature) in found.items()})
    table = pa.table({name: array for name, (array, _) in found.items()})
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


_CSV: dict[str, Any] = {"strict": True}
_TSV: dict[str, Any] = {"strict": True, "delimiter": "\t", "quoting": csv.QUOTE_NONE}


def _is_tsv(path: Path) -> bool:
    return path.suffix.lower() == ".tsv"


@contextmanager
def _table(path: Path) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """Open a file with cells, and return the names of its columns and its rows."""
    is_tsv = _is_tsv(path)
    csv.field_size_limit(2**31 - 1)  # of one text; the module's own limit is 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = _cells(csv.reader(file, **(_TSV if is_tsv else _CSV)), is_tsv)
        header = next(rows, [])
        names = [name for name in header if name]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two columns have the name {twice!r}; rename one of them")
        yield header, rows


def _cells(lines: Any, is_tsv: bool) -> Iterator[list[str]]:
    """Yield the cells of every line that is not blank, the header first."""
    width = None
    try:
        for cells in lines:
            if not cells:
                continue
            width = width or len(cells)
            if len(cells) != width:
                hint = "A TSV has no quoting: texts with tabs or line breaks need a CSV" if is_tsv else (
                    "Put texts with commas, quotes or line breaks in double quotes, and double the quotes inside"
                )  # fmt: skip
                raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the first line {width}. {hint}")
            yield cells
    except csv.Error as error:
        raise ValueError(
            f"line {lines.line_num}: {error}. A text that begins with a double quote has to end with one, and quotes "
            "inside have to be doubled; name a file without quoting .tsv"
        ) from error


def _chunked(rows: Iterator[list[str]], size: int = _CHUNK) -> Iterator[list[list[str]]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _check_unquoted(name: str, column: pa.ChunkedArray) -> None:
    """Raise ``ValueError`` for a TSV column with CSV quoting, whose quotes would become part of the texts.

    A column counts as quoted if all cells that begin with a quote are quoted as a whole, and at least one of them has a
    doubled quote inside. Texts that were written without quoting are very unlikely to meet both conditions.
    """
    quoted = pc.filter(column, pc.starts_with(column, '"'))
    whole = pc.all(pc.match_substring_regex(quoted, r'^"([^"]|"")*"$')).as_py()
    if whole and pc.any(pc.match_substring_regex(quoted, r'^".*"".*"$')).as_py():
        raise ValueError(
            f"column {name!r} is quoted as in a CSV, with doubled quotes inside, but a TSV is read without quoting. "
            "Write it without quotes, or as a comma-separated .csv"
        )


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast to integers, floats or booleans if every cell is one; integers beyond 64 bits stay strings."""
    for pattern, dtype in ((_INTEGER, pa.int64()), (_FLOAT, pa.float64()), (_BOOLEAN, pa.bool_())):
        if column.null_count < len(column) and pc.all(pc.match_substring_regex(column, pattern)).as_py():
            try:
                return column.cast(dtype)
            except pa.ArrowInvalid:
                return column
    return column


def _objects(file: TextIO, may_be_whole: bool) -> Iterable[Any]:
    """Return the rows of a file: those of its array or columns if it is one value, else one per line."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start == "[":
        return _parsed(file.read(), "")
    if may_be_whole:
        with suppress(json.JSONDecodeError):
            return _rows_of(_parsed(file.read(), ""))
        file.seek(0)
    return _lines(file)


def _lines(file: TextIO) -> Iterator[Any]:
    return (_parsed(line, f"line {number}: ") for number, line in enumerate(file, 1) if line.strip())


def _checked(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for count, row in enumerate(rows):
        if not isinstance(row, dict):  # a line or an entry of an array may be any JSON
            raise ValueError(f"row {count} (counted from 0) is {_shown(row)}, not an object of fields and values")
        yield row


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"JSON parse error: {place}{error.msg}", error.doc, error.pos) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of ``{"text": […], "label": […]}``, or the single row of ``{"text": "a", "label": 0}``."""
    columns = list(content.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return [content]
    if any(isinstance(value, dict) for column in columns for value in column):
        raise ValueError(f"holds its rows in a field ({', '.join(content)}). Write only the rows, one object per line")
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{name!r} {len(column)}" for name, column in content.items())
        raise ValueError(f"its columns have different lengths ({lengths})")
    return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]


def _column(values: list[Any]) -> tuple[pa.Array, Any]:
    """Return a column and its feature."""
    kinds = {type(value) for value in values if value is not None}
    try:
        if len(kinds) > 1 and kinds != {int, float}:
            raise pa.ArrowInvalid("mixed types")
        # Explicit types where pyarrow would read strings as another type, or infer the type from only the first values.
        array = pa.array(values, pa.string() if kinds == {str} else pa.float64() if float in kinds else None)
        return array, datasets.Features.from_arrow_schema(pa.schema({"column": array.type}))["column"]
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        encoded = [None if value is None else json.dumps(value) for value in values]
        return pa.array(encoded, pa.json_()), datasets.Json()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"

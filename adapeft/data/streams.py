"""Rows that are read while they are used, from sources that fit neither into memory nor on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import datasets
import xxhash

from adapeft.data.content import sampled_hash
from adapeft.data.sources import builder_of, file_of, hub_split, is_file, load_rows, quiet, reading, rows_of
from adapeft.data.tables import stream_csv, stream_json, table_of
from adapeft.errors import AdapeftError
from adapeft.sections.data import Data, StreamableData


@dataclass(frozen=True)
class RowStream:
    """Rows that every iteration reads anew, in the order of their source.

    A file of JSON, CSV or TSV is read as ``read_json`` and ``read_csv`` do: the builders of ``datasets`` turn the text
    2024-01-01 into a date, and NA into a missing value. ``datasets`` reads all other sources.

    Attributes:
        field: ``data.train`` or ``data.evaluation``.
        source: its value.
        column_names: columns of the rows; those of JSON are those of its first rows, and the optional ones.
        builder_name: ``text`` if the rows are lines of one text; see ``datasets.Dataset``.
        content: hash of what tells this source from others: the size and samples of a file, or the files of a hub data
            set at their revision.
        texts: key of the config → column that holds only texts.
        read: function that opens the source and yields its rows.
        remedy: what to do if a row cannot be read.
    """

    field: str
    source: str
    column_names: list[str]
    builder_name: str | None
    content: str
    texts: Mapping[str, str]
    read: Callable[[], Iterable[Mapping[str, Any]]]
    remedy: str

    def select_columns(self, names: Sequence[str]) -> RowStream:
        """Return the stream with only these columns."""
        return replace(self, column_names=list(names))

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield batches of rows, the last of which may be short.

        Raises:
            AdapeftError: a row cannot be read, or a text is none.
        """
        start, rows = 0, iter(self.read())
        while True:
            try:
                chunk = list(islice(rows, batch_size))
            except ValueError as error:  # other errors are those of a disk or network, after which a run can resume
                raise AdapeftError(
                    f"{self.field} = {self.source}: cannot be read after its first {start:,} rows: "
                    f"{str(error).rstrip('.')}. {self.remedy}."
                ) from error
            if not chunk:
                return
            batch = {name: [row.get(name) for row in chunk] for name in self.column_names}
            self._check(batch, start)
            yield batch
            start += len(chunk)

    def _check(self, batch: Mapping[str, list[Any]], start: int) -> None:
        for key, column in self.texts.items():
            bad = [row for row, value in enumerate(batch.get(column, ())) if not isinstance(value, str)]
            if bad:
                raise AdapeftError(
                    f"data.{key} = {column!r}: row {start + bad[0]} of {self.field} (counted from 0) has "
                    f"{batch[column][bad[0]]!r}, not a text. Correct or drop such rows."
                )


Rows: TypeAlias = datasets.Dataset | RowStream


def open_rows(data: Data, field: str) -> Rows:
    """Return the rows of ``data.train`` or ``data.evaluation``; with ``data.streaming`` those to train on are a stream.

    Raises:
        AdapeftError: the source does not exist, cannot be read, or is empty.
    """
    if not isinstance(data, StreamableData) or not data.streaming:
        return rows_of(data, field)
    return stream_of(data, field) if field == "data.train" else _evaluation_rows(data)


def stream_of(data: StreamableData, field: str = "data.train") -> RowStream:
    """Open ``data.train`` or ``data.evaluation`` as a stream.

    Raises:
        AdapeftError: there is no such file or data set, its first rows cannot be read, or it is empty.
    """
    source = data.train if field == "data.train" else data.evaluation
    stream = _stream_of_file(source, field) if is_file(source) else _stream_of_hub(source, field)
    with reading(field, source, stream.remedy), quiet():
        head = list(islice(stream.read(), _HEAD))
    if not head:
        raise AdapeftError(f"{field} = {source}: holds no rows. Name a source that has some.")
    names = dict.fromkeys(name for row in head for name in row)
    if source.lower().endswith(_JSON):  # a row of JSON has only the columns that it has values of
        names |= dict.fromkeys(data.optional_columns)
    return replace(stream, column_names=list(names), texts=data.text_columns)


def _evaluation_rows(data: StreamableData) -> datasets.Dataset:
    """Return the rows of ``data.evaluation`` in memory, the first ``data.evaluation_examples`` of them if it is set."""
    field, source = "data.evaluation", data.evaluation
    if data.evaluation_examples is None and is_file(source):
        return load_rows(source, field, set(data.text_columns.values()))
    stream = stream_of(data, field)
    with reading(field, source, stream.remedy), quiet():
        rows = table_of(islice(stream.read(), data.evaluation_examples))
    rows.info.builder_name = stream.builder_name
    return rows


_HEAD = 1000
"""Number of rows that tell the columns of a stream."""
_JSON = (".json", ".jsonl")


def _stream_of_file(source: str, field: str) -> RowStream:
    path, suffix, remedy = file_of(source, field)
    read: Callable[[], Iterable[Mapping[str, Any]]]
    builder_name = None
    if suffix in _JSON:
        read, remedy = partial(stream_json, path), f"{remedy}, one object per line"
    elif suffix in (".csv", ".tsv"):
        read = partial(stream_csv, path)
    else:
        builder_name, options = builder_of(path)
        with reading(field, source, remedy), quiet():
            rows = datasets.load_dataset(builder_name, split="train", streaming=True, **options)
        read = partial(iter, rows)
    return RowStream(field, source, [], builder_name, sampled_hash(path), {}, read, remedy)


def _stream_of_hub(source: str, field: str) -> RowStream:
    """Open a split as ``datasets.load_dataset(…, streaming=True)`` does, which does not tell the revision."""
    name, configuration, split, remedy = hub_split(source, field)
    with reading(field, source, remedy), quiet():
        builder = datasets.load_dataset_builder(name, configuration)
        rows = builder.as_streaming_dataset(split)
    files = {key: [list(found), found.origin_metadata] for key, found in (builder.config.data_files or {}).items()}
    content = xxhash.xxh3_128_hexdigest(repr((name, configuration, split, builder.hash, files)).encode())
    return RowStream(field, source, [], rows.builder_name, content, {}, partial(iter, rows), remedy)

"""Sources of examples: files and hub data sets, which are read as a whole or refused with the config's field."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from adapeft.data.cache import Cache, Progress
from adapeft.data.content import file_hash
from adapeft.data.tables import read_csv, read_json
from adapeft.errors import AdapeftError, did_you_mean
from adapeft.files.damage import DAMAGE
from adapeft.sections.data import Data
from adapeft.sections.paths import DATA_SUFFIXES

_DEFAULT_SPLITS = {"data.train": "train", "data.evaluation": "validation"}
_HUB_SOURCE = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")


def load_rows(source: str, field: str, texts: Collection[str] = ("text",)) -> datasets.Dataset:
    """Load all rows of a file or of one split of a hub data set.

    Args:
        source: file with a suffix of ``DATA_SUFFIXES``, or ``name``, ``name:config``, ``name@split``,
            ``name:config@split``. A text file has one row per line, which keeps its line break.
        field: ``data.train`` or ``data.evaluation``, for errors and for the default split.
        texts: columns of text, which a CSV or TSV cannot distinguish from numbers.

    Raises:
        AdapeftError: there is no such file or data set, it cannot be read, or it is empty.
    """
    rows = _read_file(source, field, texts) if is_file(source) else _read_hub(source, field)
    if not len(rows):
        raise AdapeftError(f"{field} = {source}: holds no rows. Name a source that has some.")
    return rows


def rows_of(data: Data, field: str) -> datasets.Dataset:
    """Load the rows of ``data.train`` or ``data.evaluation``, with images as such."""
    texts = {*data.text_columns.values(), *data.image_columns.values()}
    source = data.train if field == "data.train" else data.evaluation
    rows = load_rows(source, field, texts)
    for column in data.image_columns.values():
        if column in rows.column_names:
            rows = _with_images(rows, column, source)
    return rows


def _with_images(rows: datasets.Dataset, column: str, source: str) -> datasets.Dataset:
    """Return the rows with a column of files or bytes as images, which are not opened yet; as it is if it holds others.

    Relative paths start at the folder of the source, as in the metadata of an image folder.
    """
    feature = rows.features[column]
    kind = feature.dtype if isinstance(feature, datasets.Value) else ""
    if "string" in kind and is_file(source):
        folder = Path(source).expanduser().absolute().parent
        paths = [path if path is None else str(folder / path) for path in rows[column][:]]
        rows = rows.remove_columns(column).add_column(column, paths)
    is_struct = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    return rows.cast_column(column, datasets.Image()) if is_struct or "string" in kind or "binary" in kind else rows


def num_lines(source: str) -> int | None:
    """Return the lines of a file with one row per line, or the rows in a Parquet file's metadata; None for others.

    The count is independent of the code that reads the rows. Blank lines count only in a text file, the header of a CSV
    does not count, and a CSV has more lines than rows if texts contain line breaks.
    """
    path, suffix = Path(source).expanduser(), Path(source).suffix.lower()
    if suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    if not is_file(source) or suffix == ".json":
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        if suffix == ".txt":
            return sum(1 for _ in file)
        return sum(1 for line in file if line.strip("\n")) - 1 if suffix != ".jsonl" else sum(
            1 for line in file if line.strip()
        )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars of ``datasets`` within the context: every rank would show its own."""
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()


def is_file(source: str) -> bool:
    """Return whether ``source`` means a file, even a missing one. Hub names may hold versions: ``owner/corpus-1.0``."""
    if Path(source).suffix.lower() in DATA_SUFFIXES or Path(source).expanduser().exists():
        return True
    name = re.split("[:@]", source)[0]
    is_rooted = name.startswith(("/", "./", "../", "~"))
    return is_rooted or bool("/" in name and re.fullmatch(r"\.[A-Za-z]\w*", Path(name).suffix))


def file_of(source: str, field: str) -> tuple[Path, str, str]:
    """Return the path of a file, its suffix, and what to check if it cannot be read.

    Raises:
        AdapeftError: there is no such file, it is of no known kind, or it is empty.
    """
    path = Path(source).expanduser()
    known = ", ".join(DATA_SUFFIXES)
    suffix = path.suffix.lower()
    if not path.exists():
        siblings = [str(path.parent / other.name) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise AdapeftError(
            f"{field} = {source}: no such file.{did_you_mean(str(path), siblings)} Relative paths start at "
            f"{Path.cwd()}; a hub data set is written name, name@split or name:config@split."
        )
    if path.is_dir():
        raise AdapeftError(f"{field} = {source}: is a folder. Name one file in it ({known}).")
    if suffix not in DATA_SUFFIXES:
        raise AdapeftError(f"{field} = {source}: cannot read '{path.suffix}' files. Convert it to one of {known}.")
    if not path.stat().st_size:
        raise AdapeftError(f"{field} = {source}: is empty. Name a file with rows.")
    remedy = f"Check that it is {'plain text in UTF-8' if suffix == '.txt' else f'well-formed {suffix[1:]} in UTF-8'}"
    return path, suffix, remedy


def _read_file(source: str, field: str, texts: Collection[str]) -> datasets.Dataset:
    path, suffix, remedy = file_of(source, field)
    with reading(field, source, remedy):
        rows = _rows_of_file(path, suffix, texts)
        lines = num_lines(source)
    if lines is not None and (len(rows) > lines or (len(rows) < lines and suffix != ".csv")):
        raise AdapeftError(
            f"{field} = {source}: {len(rows)} rows were read from {lines} lines. {remedy}, one row per line."
        )
    return rows


def _rows_of_file(path: Path, suffix: str, texts: Collection[str]) -> datasets.Dataset:
    if suffix in _PARSED:
        return _parsed(path, suffix, texts)
    builder, options = builder_of(path)
    # The hash as name of the configuration: the cache of ``datasets`` otherwise identifies files by path and
    # modification time.
    with quiet():
        rows = datasets.load_dataset(builder, file_hash(path), split="train", **options)
    rows.data.validate(full=True)  # a Parquet file may claim that any bytes are UTF-8
    return rows


def builder_of(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the builder of ``datasets`` that reads a Parquet or text file, and its options."""
    # The path is escaped, because the builders read brackets and stars in it as a pattern.
    files = {"data_files": glob.escape(str(path.absolute()))}
    return ("parquet", files) if path.suffix.lower() == ".parquet" else ("text", {**files, **_TEXT})


_PARSED = (".csv", ".tsv", ".json", ".jsonl")
"""Suffixes of the files that this package reads itself; ``datasets`` caches what it reads."""


def _parsed(path: Path, suffix: str, texts: Collection[str]) -> datasets.Dataset:
    """Return the rows of a file from the cache, in which only the first process of a machine has to parse it."""
    content = file_hash(path)
    is_table = suffix in (".csv", ".tsv")

    def parse(folder: Path, progress: Progress) -> None:
        rows = read_csv(path, texts) if is_table else read_json(path)
        if file_hash(path) != content:
            raise ValueError("it has changed while it was read; wait until it is written")
        with pa.OSFile(str(folder / _ROWS), "wb") as file, pa.ipc.new_stream(file, rows.data.schema) as stream:
            stream.write_table(rows.data.table, max_chunksize=_BATCH)

    key = {"content": content, "suffix": suffix, "texts": sorted(texts) if is_table else []}
    return datasets.Dataset.from_file(str(Cache().folder("rows", key, parse) / _ROWS))


_ROWS, _BATCH = "rows.arrow", 10_000

# Lines keep their line breaks; a byte order mark is not part of the text.
_TEXT: dict[str, Any] = {"keep_linebreaks": True, "encoding": "utf-8-sig"}


def hub_split(source: str, field: str) -> tuple[str, str | None, str, str]:
    """Return the name, configuration and split of a hub data set, and what to do if it cannot be read.

    Raises:
        AdapeftError: it is not spelled like one.
    """
    spelling = _HUB_SOURCE.fullmatch(source)
    if spelling is None:
        raise AdapeftError(
            f"{field} = {source!r}: is neither a file nor a hub data set. Write a hub data set as name, name:config, "
            "name@split or name:config@split."
        )
    split = spelling["split"] or _DEFAULT_SPLITS[field]
    remedy = (
        f"It was read as a hub data set, split {split!r} (write name:config@split for another one); without network "
        f"access, name a file ({', '.join(DATA_SUFFIXES)})"
    )
    return spelling["name"], spelling["config"], split, remedy


def _read_hub(source: str, field: str) -> datasets.Dataset:
    """Load a split with ``datasets.load_dataset``, which runs no code of the data set."""
    name, configuration, split, remedy = hub_split(source, field)
    with reading(field, source, remedy), quiet():
        rows = datasets.load_dataset(name, name=configuration, split=split)
        rows.data.validate(full=True)
        return rows


@contextlib.contextmanager
def reading(field: str, source: str, remedy: str) -> Iterator[None]:
    """Turn the various errors of readers into ``AdapeftError`` within the context."""
    try:
        yield
    except AdapeftError:  # of the cache, not of the source
        raise
    except (*DAMAGE, DatasetsError, StopIteration) as error:
        # Errors of ``datasets`` only say that generation failed; StopIteration, of a file without rows, has no message.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        reason = str(cause).strip().rstrip(".") or "it holds no rows"
        raise AdapeftError(f"{field} = {source}: cannot be read: {reason}. {remedy}.") from error

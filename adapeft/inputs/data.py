"""Examples as they arrive, in files or from the hub: read, checked and described before anything is trained on them."""

from __future__ import annotations

import contextlib
import glob
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.exceptions import DatasetsError

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.reading import DAMAGE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adapeft.config import Data

# What reads a file, and the options that keep its texts as they are: 'NA' and 'null' in a CSV are words (only an empty
# cell is missing), and the lines of a text keep their breaks.
_WORDS_STAY_WORDS = {"keep_default_na": False, "na_values": [""]}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", _WORDS_STAY_WORDS),
    ".tsv": ("csv", {"sep": "\t", **_WORDS_STAY_WORDS}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"keep_linebreaks": True}),
}
_DEFAULT_SPLITS = {"data.train": "train", "data.evaluation": "validation"}
_HUB_SOURCE = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")


@dataclass(frozen=True)
class DataDescription:
    """What a model has to know of its data.

    ``label_names`` are the classes in the order of their numbers, or None where labels are numbers already (integers
    are their own class, floats are targets) or where there are none. ``num_labels`` is how many outputs the model's
    head needs: the classes, 1 for regression, 0 for a language model, which has its own.
    """

    num_train: int
    num_evaluation: int
    label_names: tuple[str, ...] | None
    is_regression: bool
    num_labels: int


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


def load_rows(source: str, field: str) -> datasets.Dataset:
    """All rows of a file or of one split of a hub data set.

    Args:
        source: a file with a suffix of ``_READERS``, or ``name``, ``name:config``, ``name@split``,
            ``name:config@split``. A text file gives a row a line, which keeps its line break.
        field: ``data.train`` or ``data.evaluation``, for errors and for the split taken when none is named.

    Raises:
        AdapeftError: no such file or data set, it cannot be read, or it is empty.
    """
    rows = _read_file(source, field) if _looks_like_a_file(source) else _read_hub(source, field)
    if not len(rows):
        raise AdapeftError(f"{field} = {source}: holds no rows. Name a source that has some.")
    return rows


def describe(data: Data, task: str) -> DataDescription:
    """Reads both sources, checks every text and label of theirs, and says what they hold.

    Raises:
        AdapeftError: a column is missing, a text or label is missing or of the wrong type, labels do not form classes
            or targets, or evaluation has classes that train does not.
    """
    train, evaluation = load_rows(data.train, "data.train"), load_rows(data.evaluation, "data.evaluation")
    for rows, split in ((train, "data.train"), (evaluation, "data.evaluation")):
        _check_texts(rows, split, data, task)
        if task != "causal-lm":
            _check_column(rows, split, "data.label", data.label)
            _check_values(rows, split, "data.label", data.label, _is_no_label, "not a label. Mend or drop such rows")
    if task == "causal-lm":
        return DataDescription(len(train), len(evaluation), label_names=None, is_regression=False, num_labels=0)

    kind = _label_kind(train, "data.train", data.label)
    evaluation_kind = _label_kind(evaluation, "data.evaluation", data.label)
    if kind == "float" and evaluation_kind in ("float", "integer"):
        return DataDescription(len(train), len(evaluation), label_names=None, is_regression=True, num_labels=1)
    if kind != evaluation_kind:
        raise AdapeftError(
            f"data.label = {data.label!r}: its type is {kind} in data.train and {evaluation_kind} in data.evaluation. "
            "Write the labels of both in the same way (whole numbers without a decimal point for classes)."
        )
    names = _class_names(train, data.label)
    _check_classes(train, evaluation, data.label)
    num_labels = len(names) if names else max(_values(train, data.label)) + 1
    return DataDescription(len(train), len(evaluation), names, is_regression=False, num_labels=num_labels)


def check_labels(description: DataDescription, num_labels_of_model: int) -> None:
    """Raises when the model's head has too few outputs for the classes, or any number but one for targets."""
    if description.is_regression and num_labels_of_model != 1:
        raise AdapeftError(
            f"data.label: targets (floats) need a head of 1 output, but model.name has one of {num_labels_of_model}. "
            "Name a model without a head of its own, or write the labels as integers if they are classes."
        )
    if description.num_labels > num_labels_of_model:
        raise AdapeftError(
            f"data.label: {description.num_labels} classes, but the head of model.name has {num_labels_of_model} "
            "outputs. Name a model without a head of its own, or number the classes from 0 to "
            f"{num_labels_of_model - 1}."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it ``datasets`` shows no progress bars: every rank would show its own."""
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()


# --- reading ---------------------------------------------------------------------------------------------------------


def _looks_like_a_file(source: str) -> bool:
    """Whether ``source`` is a file, be it a missing one. Hub names may hold versions: ``owner/corpus-1.0``."""
    if Path(source).suffix.lower() in _READERS or Path(source).expanduser().exists():
        return True
    name = re.split("[:@]", source)[0]
    is_rooted = name.startswith(("/", "./", "../", "~"))
    return is_rooted or bool("/" in name and re.fullmatch(r"\.[A-Za-z]\w*", Path(name).suffix))


def _read_file(source: str, field: str) -> datasets.Dataset:
    path = Path(source).expanduser()
    known = ", ".join(_READERS)
    if not path.exists():
        siblings = [str(path.parent / other.name) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise AdapeftError(
            f"{field} = {source}: no such file.{did_you_mean(str(path), siblings)} Relative paths start at "
            f"{Path.cwd()}; a hub data set is written name, name@split or name:config@split."
        )
    if path.is_dir():
        raise AdapeftError(f"{field} = {source}: is a folder. Name one file in it ({known}).")
    if path.suffix.lower() not in _READERS:
        raise AdapeftError(f"{field} = {source}: cannot read '{path.suffix}' files. Convert it to one of {known}.")
    if not path.stat().st_size:
        raise AdapeftError(f"{field} = {source}: is empty. Name a file with rows.")
    builder, options = _READERS[path.suffix.lower()]
    remedy = f"Check that it is {'plain text in UTF-8' if builder == 'text' else f'well-formed {path.suffix[1:]}'}"
    # Escaped, because the builders read brackets and stars in a path as a pattern.
    return _load(builder, field, source, remedy, data_files=glob.escape(str(path.absolute())), split="train", **options)


def _read_hub(source: str, field: str) -> datasets.Dataset:
    spelling = _HUB_SOURCE.fullmatch(source)
    if spelling is None:
        raise AdapeftError(
            f"{field} = {source!r}: neither a file nor a hub data set; write name, name:config, name@split or "
            "name:config@split."
        )
    split = spelling["split"] or _DEFAULT_SPLITS[field]
    remedy = (
        f"It was taken for a hub data set, split {split!r} (name:config@split chooses others); without network, "
        f"name a file ({', '.join(_READERS)})"
    )
    return _load(spelling["name"], field, source, remedy, name=spelling["config"], split=split)


def _load(path: str, field: str, source: str, remedy: str, **options: Any) -> datasets.Dataset:
    """``datasets.load_dataset``, which runs no code of the data set's; its many errors become ours."""
    try:
        with quiet():
            rows = datasets.load_dataset(path, **options)
        rows.data.validate(full=True)  # the JSON reader does not look whether its texts are UTF-8
        return rows
    except (*DAMAGE, DatasetsError, StopIteration) as error:
        # The error itself often says no more than that generation failed; a file without rows says nothing at all.
        reason = str(error.__cause__ or error).strip().rstrip(".") or "it holds no rows"
        raise AdapeftError(f"{field} = {source}: cannot be read: {reason}. {remedy}.") from error


# --- checking --------------------------------------------------------------------------------------------------------


def _values(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    # As Arrow: datasets would decode images and sounds, by opening whatever file a row names.
    for batch in rows.select_columns(column).with_format("arrow").iter(batch_size=1000):
        yield from batch[column].to_pylist()


def _check_texts(rows: datasets.Dataset, split: str, data: Data, task: str) -> None:
    if task == "causal-lm" and data.text_pair is not None:
        raise AdapeftError(f"data.text_pair = {data.text_pair!r}: causal-lm reads one text. Set it to null.")
    for field, column in (("data.text", data.text), ("data.text_pair", data.text_pair)):
        if column is not None:
            _check_column(rows, split, field, column)
            _check_values(rows, split, field, column, _is_no_text, "not a text. Mend or drop such rows")


def _check_column(rows: datasets.Dataset, split: str, field: str, column: str) -> None:
    if column not in rows.column_names:
        raise AdapeftError(
            f"{field} = {column!r}: {split} has no such column.{did_you_mean(column, rows.column_names)} "
            f"It has {', '.join(map(repr, rows.column_names))}."
        )


def _check_values(
    rows: datasets.Dataset, split: str, field: str, column: str, is_bad: Callable[[Any], bool], complaint: str
) -> None:
    bad = [(row, value) for row, value in enumerate(_values(rows, column)) if is_bad(value)]
    if bad:
        row, value = bad[0]
        raise AdapeftError(
            f"{field} = {column!r}: row {row} of {split} (counted from 0) has {value!r}, {complaint} "
            f"({len(bad)} of {len(rows)})."
        )


def _is_no_text(value: Any) -> bool:
    return not isinstance(value, str)


def _is_no_label(value: Any) -> bool:
    """None, NaN, ±∞ and negative classes: −1 is how unlabelled rows are marked. A negative float is a target."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, int) and value < 0)


def _label_kind(rows: datasets.Dataset, split: str, column: str) -> str:
    """``integer`` (named or not), ``boolean``, ``string`` or ``float``."""
    feature = rows.features[column]
    dtype = feature.dtype if isinstance(feature, datasets.ClassLabel | datasets.Value) else ""
    for kind, pattern in (("integer", "u?int"), ("boolean", "bool"), ("string", "(large_)?string"), ("float", "float")):
        if re.match(pattern, dtype):
            return kind
    raise AdapeftError(
        f"data.label = {column!r}: {split} holds {feature} in it. Labels are integers, booleans or strings (classes) "
        "or floats (targets), of one type throughout."
    )


def _class_names(rows: datasets.Dataset, column: str) -> tuple[str, ...] | None:
    """The classes of checked labels by number: a hub data set's own names, else sorted; None for plain integers."""
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    present = set(_values(rows, column))
    return None if all(type(label) is int for label in present) else tuple(sorted(map(str, present)))


def _check_classes(train: datasets.Dataset, evaluation: datasets.Dataset, column: str) -> None:
    known = set(_values(train, column))
    if len(known) < 2:
        raise AdapeftError(
            f"data.label = {column!r}: every row of data.train has the label {known.pop()!r}. Give at least two "
            "classes (or floats, with a decimal point, for regression)."
        )
    unknown = [label for label in _values(evaluation, column) if label not in known]
    if unknown:
        raise AdapeftError(
            f"data.label = {column!r}: data.evaluation has labels that data.train does not: "
            f"{', '.join(map(repr, sorted(set(unknown))))} ({len(unknown)} of {len(evaluation)} rows). Add such rows "
            "to data.train or drop them."
        )

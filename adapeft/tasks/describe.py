"""Validation and description of a config's data before training."""

from __future__ import annotations

from collections.abc import Sequence

from adapeft.data.columns import check_column, check_texts
from adapeft.data.content import rows_hash
from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.sources import num_lines
from adapeft.data.streams import Rows, RowStream, open_rows
from adapeft.sections.data import Data
from adapeft.tasks.task import Task


def describe(task: Task, data: Data, head: Head | None = None) -> DataDescription:
    """Read both sources, check all texts and labels, and return their description.

    Of a stream only the columns are checked, and its texts when they are read.

    Args:
        task: the task.
        data: the config's ``data`` section.
        head: trained head that the labels belong to; None for a new head.

    Raises:
        AdapeftError: a column is missing or named twice, a text is missing or has the wrong type, or the labels are
            invalid for the task.
    """
    splits = {split: open_rows(data, split) for split in ("data.train", "data.evaluation")}
    columns = {split: task.columns(rows, split, data) for split, rows in splits.items()}
    for split, rows in splits.items():
        if isinstance(rows, RowStream):
            for field, name in data.text_columns.items():
                check_column(rows, split, f"data.{field}", name)
            continue
        check_texts(rows, split, data)
        for field, name in data.image_columns.items():
            check_column(rows, split, f"data.{field}", name)
        for field, names in data.label_columns.items():
            for name in names:
                check_column(rows, split, f"data.{field}", name)
    labels = task.labels(splits, data, head)
    num_rows = {split: None if isinstance(rows, RowStream) else len(rows) for split, rows in splits.items()}
    num_evaluation = num_rows["data.evaluation"]
    assert num_evaluation is not None, "only data.train is streamed"
    return DataDescription(
        num_rows["data.train"],
        num_evaluation,
        labels.names,
        labels.problem_type,
        labels.num_outputs,
        lines={
            "data.train": None if data.is_streamed else num_lines(data.train),
            "data.evaluation": num_lines(data.evaluation),
        },
        content={split: _content(rows, columns[split]) for split, rows in splits.items()},
    )


def _content(rows: Rows, columns: Sequence[str]) -> str:
    return rows.content if isinstance(rows, RowStream) else rows_hash(rows, columns)

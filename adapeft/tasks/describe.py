"""Validation and description of a config's data before training."""

from __future__ import annotations

from adapeft.data.columns import check_column, check_texts
from adapeft.data.content import rows_hash
from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.sources import num_lines, rows_of
from adapeft.sections.data import Data
from adapeft.tasks.task import Task


def describe(task: Task, data: Data, head: Head | None = None) -> DataDescription:
    """Read both sources, check all texts and labels, and return their description.

    Args:
        task: the task.
        data: the config's ``data`` section.
        head: trained head that the labels belong to; None for a new head.

    Raises:
        AdapeftError: a column is missing or named twice, a text is missing or has the wrong type, or the labels are
            invalid for the task.
    """
    splits = {split: rows_of(data, split) for split in ("data.train", "data.evaluation")}
    columns = {split: task.columns(rows, split, data) for split, rows in splits.items()}
    for split, rows in splits.items():
        check_texts(rows, split, data)
        for field, name in data.image_columns.items():
            check_column(rows, split, f"data.{field}", name)
        for field, names in data.label_columns.items():
            for name in names:
                check_column(rows, split, f"data.{field}", name)
    labels = task.labels(splits, data, head)
    return DataDescription(
        len(splits["data.train"]),
        len(splits["data.evaluation"]),
        labels.names,
        labels.problem_type,
        labels.num_outputs,
        lines={"data.train": num_lines(data.train), "data.evaluation": num_lines(data.evaluation)},
        content={split: rows_hash(rows, columns[split]) for split, rows in splits.items()},
    )

"""The data of a config, checked and described before anything is trained on it."""

from __future__ import annotations

from adapeft.data.columns import check_column, check_texts, named_columns
from adapeft.data.content import rows_hash
from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.sources import num_lines, rows_of
from adapeft.sections.data import Data
from adapeft.tasks.task import Task


def describe(task: Task, data: Data, head: Head | None = None) -> DataDescription:
    """Reads both sources, checks every text and label of theirs, and says what they hold.

    Args:
        task: that reads them.
        data: the config's section.
        head: the trained head that the labels are for; None where it is new.

    Raises:
        AdapeftError: a column is missing or is named twice, a text is missing or of the wrong type, or the task cannot
            take the labels.
    """
    columns = named_columns(data)
    splits = {split: rows_of(data, split) for split in ("data.train", "data.evaluation")}
    for split, rows in splits.items():
        check_texts(rows, split, data)
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
        content={split: rows_hash(rows, columns) for split, rows in splits.items()},
    )

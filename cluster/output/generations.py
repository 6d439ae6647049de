"""Files of generated answers: one JSON object per line, with the fields of ``Generation``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from adapeft.files.artifact import save_text
from adapeft.files.damage import reading
from adapeft.tasks.generation import Generation


def save_generations(path: Path, generations: Sequence[Generation]) -> None:
    save_text(path, "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in generations))


def load_generations(path: Path) -> list[Generation]:
    """Return the generations in a file; none if there is no file.

    Raises:
        AdapeftError: the file is damaged.
    """
    if not path.is_file():
        return []
    parser = TypeAdapter(Generation)
    with reading(f"{path}: damaged", "Remove it, and run again."):
        # Not splitlines: answers may hold other characters that end a line.
        lines = path.read_text(encoding="utf-8").split("\n")
        return [parser.validate_json(line) for line in lines if line]

"""What the log of a run's events says of its training. Imports only the standard library, as ``process.py`` does."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any


def evaluations(path: Path) -> dict[int, dict[str, float]]:
    """Return step → scores of all evaluations after the first step, in order; those of a resumed run included."""
    found = {line["at"]: line for line in _lines(path) if line["message"] == "evaluated" and line["at"]}
    # Numbers that are not finite are written as text.
    return {
        step: {name: float(line[name]) for name in (line["metric"], "loss")} for step, line in sorted(found.items())
    }


def seconds_of_stages(path: Path) -> float:
    """Return the seconds that a run has spent in its stages, finished or not, over all its attempts."""
    lines = _lines(path)
    # The time before the start of a stage may be that between two attempts.
    pairs = [(before, after) for before, after in pairwise(lines) if after["message"] != "started"]
    return sum((_time(after) - _time(before)).total_seconds() for before, after in pairs)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the events; none if there is no log yet, and without a line that is being written."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def _time(line: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(line["time"])

"""Progress events: plain dictionaries, so that any launcher can pass them from a rank to the launching process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]
"""Callback for events such as ``{"stage": "measure", "step": "direction", "done": 3, "total": 16, …}``."""


def ignore(event: dict[str, Any]) -> None:
    """Discard the event."""


def to_all(*reports: Report) -> Report:
    """Return a report that passes every event to each of ``reports``."""

    def report(event: dict[str, Any]) -> None:
        for each in reports:
            each(event)

    return report

"""What a rank tells whoever watches: plain dictionaries, so that any launcher can carry them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]
"""Takes an event: ``{"stage": "measure", "step": "direction", "done": 3, "total": 16, …}``."""


def to_all(*reports: Report) -> Report:
    """Tells each of them."""

    def report(event: dict[str, Any]) -> None:
        for each in reports:
            each(event)

    return report

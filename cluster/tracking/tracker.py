"""The interface of a tracker, and what it learns of a run when it starts.

The clients are called directly: the integrations of accelerate and transformers belong on a rank. Both need the
``PartialState`` of accelerate, which in the launching process waits for a process group if ``WORLD_SIZE`` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers see it.

    Attributes:
        name: name of the run.
        config: dotted key → value, without secrets.
        logs: folder for files of the run.
        known: id of the run in this tracker, if an earlier command has started it.
    """

    name: str
    config: Mapping[str, Any]
    logs: Path
    known: str | None


class Tracker(Protocol):
    """One tracker. All calls come from one thread, in order, and raise whatever its package raises."""

    def start(self, run: TrackedRun) -> str:
        """Start the run, or continue the one that is known, and return its id."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""

    def finish(self, *, failed: bool) -> None:
        """End the run, after everything has been sent."""

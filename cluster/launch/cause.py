"""Why workers failed, in the two lines that a person reads first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapeft.errors import AdapeftError
from cluster.failure import WorkerError


@dataclass(frozen=True)
class Failure:
    """What happened to one rank.

    Attributes:
        kind: class of the error.
        message: its text.
        is_lost: whether the process is gone.
    """

    kind: str
    message: str
    is_lost: bool = False

    @property
    def is_consequence(self) -> bool:
        """Whether the rank only saw the connection to another one go."""
        return "closed by peer" in self.message or "reset by peer" in self.message


def worker_error(failures: Sequence[Failure], logs: Path) -> AdapeftError | WorkerError:
    """What to raise when ranks failed: the first cause, and where to read on.

    Args:
        failures: of the ranks that failed, in their order; at least one.
        logs: folder of the ranks' logs.
    """
    for failure in failures:
        if "device-side assert" in failure.message:  # an index out of range, seen only when the GPU got to it
            return AdapeftError(
                "the model was given an index that one of its tables does not have: a token, a position or a class. "
                f"Check that tokenizer, data.max_length and classes belong to the model. More in {logs}."
            )
    lost = [failure for failure in failures if failure.is_lost]
    first = (lost or [failure for failure in failures if not failure.is_consequence] or list(failures))[0]
    lines = first.message.strip().splitlines()
    message = f"a worker failed: {first.kind}: {lines[0] if lines else ''}\nMore in {logs}."
    # The others see their connection go, at times before the launcher sees the process go.
    if lost or all(failure.is_consequence for failure in failures):
        message += "\nIts process or machine is gone; the same command goes on from what was saved."
    return WorkerError(message)

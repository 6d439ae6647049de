"""What the command ends with, for scripts."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Statuses of every subcommand."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    INTERRUPTED = 130


_MEANINGS = {
    ExitStatus.DONE: "done",
    ExitStatus.FAILED: "a worker, machine or job failed, and the same command goes on from what was saved",
    ExitStatus.REFUSED: "the input is at fault, and the message says what to mend",
    ExitStatus.INTERRUPTED: "interrupted, and the same command goes on",
}

EPILOG = "Exit status: " + "; ".join(f"{status.value} {meaning}" for status, meaning in _MEANINGS.items()) + "."

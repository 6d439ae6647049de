"""Exit statuses of the command, for scripts."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    DONE = 0
    FAILED = 1
    REFUSED = 2
    INTERRUPTED = 130


_MEANINGS = {
    ExitStatus.DONE: "done",
    ExitStatus.FAILED: "a worker, machine or job failed, and the same command resumes from what was saved",
    ExitStatus.REFUSED: "the input is invalid, and the message says what to fix",
    ExitStatus.INTERRUPTED: "interrupted, and the same command resumes",
}

EPILOG = "Exit status: " + "; ".join(f"{status.value} {meaning}" for status, meaning in _MEANINGS.items()) + "."

"""The error message of failed workers: the first cause in two lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapeft.errors import AdapeftError
from cluster.failure import WorkerError


@dataclass(frozen=True)
class Failure:
    """The failure of one rank.

    Attributes:
        kind: class name of the error.
        message: text of the error.
        is_lost: whether the process is gone.
    """

    kind: str
    message: str
    is_lost: bool = False

    @property
    def is_consequence(self) -> bool:
        """Whether the rank failed only because it lost the connection to another rank."""
        return "closed by peer" in self.message or "reset by peer" in self.message


def worker_error(failures: Sequence[Failure], logs: Path) -> AdapeftError | WorkerError:
    """Return the error to raise for failed ranks: the first cause, and the folder of the logs.

    Args:
        failures: failures by ascending rank; at least one.
        logs: folder of the ranks' logs.
    """
    for failure in failures:
        if "device-side assert" in failure.message:  # index out of range, detected only on the GPU
            return AdapeftError(
                "an index (a token, position or class) is out of range for one of the model's tables. "
                f"Check that the tokenizer, data.max_length and the classes match the model. See the logs in {logs}."
            )
    lost = [failure for failure in failures if failure.is_lost]
    first = (lost or [failure for failure in failures if not failure.is_consequence] or list(failures))[0]
    lines = first.message.strip().splitlines()
    message = f"a worker failed: {first.kind}: {lines[0] if lines else ''}\nSee the logs in {logs}."
    # Other ranks may notice the lost connection before the launcher notices that the process is gone.
    if lost or all(failure.is_consequence for failure in failures):
        message += "\nIts process or machine is gone. Run the same command again to resume from what was saved."
    return WorkerError(message)

"""Rows that give no example: an error, or dropped, as ``data.invalid`` and the other rules of the config say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from adapeft.errors import AdapeftError

R = TypeVar("R")
E = TypeVar("E")

REMEDY = "Correct or drop such rows, or set data.invalid: drop"


class InvalidRowError(ValueError):
    """A row is no valid example; the message completes "row N: …"."""


class RefusedError(InvalidRowError):
    """Another rule of the config, such as that for long examples, refuses a row whatever ``data.invalid`` says."""


class DroppedError(Exception):
    """Another rule of the config, such as that for long examples, drops a row; the message completes "row N: …"."""


class RowFilter:
    """What makes examples of rows, batch by batch; ``invalid`` is ``data.invalid``."""

    def __init__(self, invalid: Literal["error", "drop"]) -> None:
        self._invalid = invalid
        self._num_rows = self._num_kept = 0
        self._first_dropped = ""

    def examples(self, rows: Iterable[R], make: Callable[[R], E]) -> list[E]:
        """Return what ``make`` makes of the next rows, without those that are dropped.

        Raises:
            AdapeftError: the config refuses a row. Names it.
        """
        made = []
        for row in rows:
            try:
                made.append(make(row))
            except DroppedError as reason:
                self._drop(reason)
            except InvalidRowError as error:
                if self._invalid == "error" or isinstance(error, RefusedError):
                    raise AdapeftError(f"row {self._num_rows} (counted from 0): {error}.") from error
                self._drop(error)
            self._num_rows += 1
        self._num_kept += len(made)
        return made

    def check_any(self, what: str) -> None:
        """Check that the rows have given an example; ``what`` names them in the message.

        Raises:
            AdapeftError: all are dropped. Says why the first is.
        """
        if not self._num_kept:
            raise AdapeftError(f"all {self._num_rows} {what} are dropped; the first is {self._first_dropped}.")

    def _drop(self, reason: Exception) -> None:
        self._first_dropped = self._first_dropped or f"row {self._num_rows}: {reason}"

"""The one error that is a worker's: neither the user's input nor a bug of the command that was watching."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A worker raised or died. The message has the first cause and where its output is."""

"""The error of a failed worker, as opposed to invalid user input or a bug in the launching command."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A worker raised an exception or died. The message gives the first cause and the folder of the logs."""

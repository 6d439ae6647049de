"""Errors that are a worker's: neither the user's input nor a bug of the command that was watching."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A worker raised or died. The message has the first cause and where its output is."""


class WorkerLostError(WorkerError):
    """A worker's process or machine is gone; others in its place may succeed."""

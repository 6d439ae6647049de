"""Child processes that share only the disk with the tests."""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
"""Starts each process from a server that has imported the libraries, which takes seconds, once for all tests."""
FORKS.set_forkserver_preload(["pytest", "tests.support.preloaded"])

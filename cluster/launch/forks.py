"""The process that workers of this machine are forks of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver

from adapeft.sections.cluster import Cluster
from cluster.launch.resources import environment_of

_PRELOADED = ["cluster.ranks.measure", "cluster.ranks.finetune"]


def prepare(cluster: Cluster) -> None:
    """Starts a process that imports the libraries of workers while this one does something else.

    Workers without a GPU are forks of it. CUDA does not survive a fork, so workers with one start from nothing.
    """
    if not cluster.gpus_per_worker:
        with worker_environment(cluster):
            forkserver.set_forkserver_preload(_PRELOADED)
            forkserver.ensure_running()


@contextmanager
def worker_environment(cluster: Cluster) -> Iterator[None]:
    """A worker's variables, for the processes that are started within: libraries read some when they are imported."""
    theirs = environment_of(cluster)
    before = {name: os.environ.get(name) for name in theirs}
    os.environ.update(theirs)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

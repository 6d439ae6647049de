"""The fork server from which local workers are forked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver

from adapeft.sections.cluster import Cluster
from cluster.launch.resources import environment_of

_PRELOADED = ["cluster.ranks.measure", "cluster.ranks.finetune"]


def prepare(cluster: Cluster) -> None:
    """Start a fork server that imports the workers' libraries in the background.

    Workers without a GPU are forked from it. CUDA does not survive a fork, so workers with a GPU are spawned.
    """
    if not cluster.gpus_per_worker:
        with worker_environment(cluster):
            forkserver.set_forkserver_preload(_PRELOADED)
            forkserver.ensure_running()


@contextmanager
def worker_environment(cluster: Cluster) -> Iterator[None]:
    """Set a worker's environment variables for processes started in the block: libraries read some on import."""
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

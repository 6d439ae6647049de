"""Runs without Ray: the same stages write the same files, each in a fork of a process that has the libraries.

On two cores a run under Ray Train spends about two minutes of processor time on starting workers, more than a small
model's training takes. Nothing differs that is measured but the seconds, which hold no start of Ray.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from cluster.commands.compare.run import Outcome, run_apart
from cluster.run import pipeline
from cluster.run.session import Session
from cluster.terminal.console import Terminal

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__, "cluster.ranks.measure", "cluster.ranks.finetune"])


class ForkSession(Session):
    """A session whose one worker is a fork of a process that has the libraries and has computed nothing.

    Of this process it must not be one: once OpenMP's threads have worked here, a fork waits for threads it lacks.
    """

    def on_workers(self, function: Any, stage: str, **arguments: Any) -> dict[str, Any]:
        """See ``Session``; of what happens meanwhile nothing is logged."""
        with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
            return pool.submit(_as_the_only_rank, function, self.config, arguments).result()


def run_in_fork(config: Config) -> Outcome:
    """As ``cluster.commands.compare.run.run_command``, with one worker."""
    assert config.cluster.workers == 1, "a fork is one worker"
    return run_apart(config, _fork)


def _fork(settings: Path, log: Path) -> int:
    process = FORKSERVER.Process(target=_run, args=(settings, log))
    process.start()
    process.join()
    return process.exitcode or 0


def _run(settings: Path, log: Path) -> None:
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            with ForkSession(load_config(settings), Terminal()) as session:
                pipeline.run(session)
        except AdapeftError as error:
            print(f"error   {error}")
            sys.exit(1)


def _as_the_only_rank(function: Any, config: Config, arguments: dict[str, Any]) -> dict[str, Any]:
    be_the_only_rank()
    return function(config, lambda event: None, **arguments)


def be_the_only_rank() -> None:
    """Makes this process what a launcher would call rank 0 of 1."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

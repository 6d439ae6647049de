"""The machine that executes the runs of a comparison; see ``on_ray`` for those of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from adapeft.config.config import Config
from cluster.commands.compare.machines.apart import run_apart
from cluster.commands.compare.machines.process import Process
from cluster.commands.compare.run import Outcome
from cluster.output.contents import KnownContents


class Machines:
    """This machine, which executes a queue of processes.

    Args:
        at_once: largest number of runs at once; None: as many as there is room for, which only a cluster knows.

    Attributes:
        contents: hashes of the runs' inputs, each read once.
    """

    def __init__(self, at_once: int | None = 1) -> None:
        self.at_once = at_once
        self.contents = KnownContents()

    def run(self, config: Config) -> Outcome:
        """Execute ``adapeft run`` unless the run is finished; see ``run_apart``."""
        return run_apart(self.placed(config), partial(self.execute, "run"), self.contents)

    def placed(self, config: Config) -> Config:
        """Return the config with workers that start where the run is executed."""
        return config

    def execute(self, command: str, settings: Path, log: Path) -> int:
        """Execute a command with a config in a process of its own; wait for it and return its exit status."""
        return Process(command, str(settings), log=log).wait()

    @contextmanager
    def pool(self, num_tasks: int) -> Iterator[ThreadPoolExecutor]:
        """Yield the threads that wait for the runs of ``num_tasks`` sequences of runs."""
        pool = ThreadPoolExecutor(min(num_tasks, self.at_once or num_tasks))
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no run

"""A stage of a run, as it is sent to every rank."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapeft.config.config import Config
from adapeft.errors import AdapeftError
from cluster.events import Report, ignore
from cluster.launch.copies import Look, run_copy
from cluster.output.folder import RunFolder
from cluster.output.log import rank_log
from cluster.ranks.peak import reset_peak

RankFunction = Callable[..., dict[str, Any]]
"""``(config, report, **arguments) → result``; imports no launcher."""

_EVENT_INTERVAL = 0.2


@dataclass(frozen=True)
class Stage:
    """A function for every rank, its arguments, and settings of the run.

    Attributes:
        name: name of the stage, used in the names of the logs.
        function: function to call on every rank.
        config: first argument of ``function``.
        arguments: keyword arguments of ``function``.
        run_id: identity of the run in the logs.
        mark: name of a file that the launching process created in the run's logs.
        puts: whether to upload files that the ranks write in the run folder to the output URL.
    """

    name: str
    function: RankFunction
    config: Config
    arguments: dict[str, Any]
    run_id: str
    mark: str
    puts: bool

    def run(self, rank: int, machine: str, tell: Report) -> None:
        """Run the stage on this rank, with its output in the run's logs.

        Args:
            rank: rank of this process.
            machine: unique identifier of this machine among those of the ranks.
            tell: callback that sends events to the launching process: progress and ``result`` of rank 0, an
                ``AdapeftError`` of any rank as ``refused``, and finally ``ended``.

        Raises:
            AdapeftError: the function raised one; recreated from its message alone, so that it can be pickled.
        """
        log = RunFolder.of(self.config).logs / f"{self.name}-rank-{rank}"
        reset_peak()
        try:
            with (
                run_copy(self.config, self.mark, machine, puts=self.puts) as look,
                _output_to(log.with_suffix(".log")),
                rank_log(log.with_suffix(".jsonl"), self.run_id, self.name, rank),
            ):
                report = _reporter(tell, look) if rank == 0 else ignore
                result = self.function(self.config, report, **self.arguments)
        except AdapeftError as error:
            # Sent immediately: the other ranks lose this one, and the launcher may see only their failure.
            tell({"refused": str(error)})
            raise AdapeftError(str(error)) from None
        # An engine and its hooks form reference cycles: without this the next stage would start with their memory.
        gc.collect()
        if rank == 0:
            tell({"result": result})
        tell({"ended": rank})


def _reporter(tell: Report, look: Look) -> Report:
    """Return a report that forwards events to ``tell``, but counts of one step at most every ``_EVENT_INTERVAL``."""
    last: dict[str, Any] = {"step": None, "time": 0.0}

    def report(event: dict[str, Any]) -> None:
        is_count = "done" in event and "loss" not in event and event["done"] < event["total"]
        now = time.monotonic()
        if is_count and event["step"] == last["step"] and now - last["time"] < _EVENT_INTERVAL:
            return
        last.update(step=event["step"], time=now)
        tell(event)
        look()

    return report


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect standard output and error, including those of C libraries and the last traceback, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        saved = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)

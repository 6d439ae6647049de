"""A run as a trial of Ray Tune, which reports its evaluations and can be stopped after any of them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune import Trainable

from cluster.commands.compare.events import evaluations
from cluster.commands.compare.machines.process import Process
from cluster.commands.compare.machines.task import check_is_visible

_POLL_SECONDS = 0.2


class Tried(NamedTuple):
    """What a trial executes.

    Attributes:
        group: number of the method and budget, whose trials compete.
        settings: config file of the run.
        log: file that gets all output of its process.
        events: log of its events.
        is_finished: whether an earlier comparison has finished it.
        num_steps: number of its optimizer steps.
        metric: name of the score.
        environment: environment variables of its process in addition to those of the machine.
    """

    group: int
    settings: str
    log: str
    events: str
    is_finished: bool
    num_steps: int
    metric: str
    environment: dict[str, str]


class Trial(Trainable):
    """Reports every evaluation of a run as ``step``, the score and ``loss``; last of all the ``status`` of its process.

    Evaluations that an earlier comparison has made are reported from the log, and the process is started when there
    are no more of them. A trial that is stopped interrupts the process, so that another comparison can resume the run.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._tried = Tried(**config["all"][config["number"]])
        check_is_visible(self._tried.settings)
        self._process: Process | None = None
        self._status = 0 if self._tried.is_finished else None
        self._last: dict[str, Any] = {"step": 0, self._tried.metric: float("nan"), "loss": float("nan")}

    def step(self) -> dict[str, Any]:
        while not self._reads_next():
            if self._status is not None:
                return {**self._last, **self._at_end(), "status": self._status, "done": True}
            if self._process is None:
                environment = {**os.environ, **self._tried.environment}
                self._process = Process("run", self._tried.settings, log=Path(self._tried.log), environment=environment)
            time.sleep(_POLL_SECONDS)
            # Before the log is read again: the last evaluations may be written at the very end.
            self._status = self._process.status()
        return {**self._last, "status": None}

    def cleanup(self) -> None:
        if self._process is not None:
            self._process.stop()

    def _reads_next(self) -> bool:
        """Take the next evaluation from the log; at that of the last step there is nothing left to stop."""
        for step, scores in evaluations(Path(self._tried.events)).items():
            if self._last["step"] < step < self._tried.num_steps:
                self._last = {"step": step, **scores}
                return True
        return False

    def _at_end(self) -> dict[str, Any]:
        """Return the evaluation of the last step, if it was reached."""
        scores = evaluations(Path(self._tried.events)).get(self._tried.num_steps)
        return {} if scores is None else {"step": self._tried.num_steps, **scores}

"""Runs of one method on one set of examples."""

from __future__ import annotations

import math
from typing import Any

from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from cluster.commands.compare.counter import Counter
from cluster.commands.compare.run import REFUSED, Job, Run, Runner, with_values
from cluster.output.folder import RunFolder


class Line:
    """Runs of one method on one set of examples, in sequence: all choose from the first one's statistics.

    Runs that an earlier comparison began keep the statistics they began with.
    """

    def __init__(self, config: Config, run: Runner, done: Counter) -> None:
        self._config, self._run, self._done = config, run, done
        self._measured: str | None = None

    def run(self, job: Job) -> Run:
        """Execute the run and report its end."""
        begun = RunFolder(job.folder).config
        try:
            statistics = load_config(begun).select.statistics if begun.is_file() else self._measured
        except AdapeftError as error:
            return self.give_up(job, f"{REFUSED}{error}")
        config = with_values(job.applied_to(self._config), "select", statistics=statistics)
        metrics, failure = self._run(config)
        if failure is None and self._measured is None:
            self._measured = str(job.folder)
        return self._ended(job, metrics, failure)

    def give_up(self, job: Job, reason: str) -> Run:
        """Report a run that cannot be executed."""
        return self._ended(job, None, reason)

    def _ended(self, job: Job, metrics: dict[str, Any] | None, failure: str | None) -> Run:
        given = self._config.train.learning_rate if job.learning_rate is None else job.learning_rate
        rate = (metrics or {}).get("learning_rate", math.nan) if given == "auto" else given
        run = Run(job.contender, job.budget, job.seed, job.folder, rate, metrics, failure)
        self._done(run)
        return run

"""A run of a comparison: its config, folder, execution and result."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.config.load import load_config
from adapeft.config.write import to_yaml
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_text
from adapeft.finite import DIVERGED
from adapeft.methods.options import OPTIONS
from adapeft.methods.registry import get_method
from adapeft.sections.budget import Budget
from adapeft.sections.section import together
from adapeft.sections.select import Select
from cluster.output.contents import KnownContents
from cluster.output.folder import RunFolder
from cluster.output.metrics import load_metrics

Note = Callable[[str], None]
Outcome = tuple[dict[str, Any] | None, str | None]
"""Metrics of a run, or the reason why there are none."""
Runner = Callable[[Config], Outcome]
Contents = Callable[[Config], Mapping[str, str]]

REFUSED = "error "
"""Beginning of a command's message if its input is invalid."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        contender: method and granularity.
        budget: budget.
        seed: seed.
        folder: output folder.
        learning_rate: learning rate of training; NaN if it failed before it found one.
        metrics: metrics of the finished run; None if it failed.
        failure: reason of the failure, if any.
        swept: learning rate → score, of the sweep that found the learning rate; not finite where there was none.
    """

    contender: Contender
    budget: Budget
    seed: int
    folder: Path
    learning_rate: float
    metrics: dict[str, Any] | None = None
    failure: str | None = None
    swept: Mapping[float, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float] | None:
        """Scores after the last step, because the best evaluation would be chosen on the data that is scored."""
        return None if self.metrics is None else self.metrics["last"]

    @property
    def is_refused(self) -> bool:
        """Whether its input was invalid, such as a budget too small for any rank: no learning rate fixes that."""
        return self.failure is not None and self.failure.startswith(REFUSED) and not self.has_diverged

    @property
    def has_diverged(self) -> bool:
        """Whether its training diverged, which counts as the worst outcome; another learning rate may prevent it."""
        return self.failure is not None and f"{REFUSED}{DIVERGED}" in self.failure


@dataclass(frozen=True)
class Job:
    """A run to execute.

    Attributes:
        learning_rate: learning rate of training; None: the config's.
        keys: settings of the comparison that override the config's ``select``.
    """

    contender: Contender
    budget: Budget
    seed: int
    learning_rate: float | None
    folder: Path
    keys: Mapping[str, Any] = field(default_factory=dict)

    def applied_to(self, config: Config) -> Config:
        train = config.train.model_dump()
        if self.learning_rate is not None:
            train["learning_rate"] = self.learning_rate
        mine = {"select": self._select(config.select).model_dump(), "train": train}
        return Config.model_validate({**config.model_dump(), **mine, "seed": self.seed, "output": str(self.folder)})

    def _select(self, settings: Select) -> Select:
        """Return the settings for this method, with those of its own options that are valid for its granularity."""
        options = OPTIONS[self.contender.method]
        given = {**settings.model_dump(), **self.keys}
        mine = {key: given[key] for key in Select.model_fields} | self.contender.settings | {"budget": self.budget}
        own = {key: field for key, field in options.model_fields.items() if key not in mine}
        for keys in together(own):
            theirs = {key: given[key] for key in keys if key in given}
            with suppress(ValidationError):
                mine = options.model_validate({**mine, **theirs}).model_dump(include={*mine, *theirs})
        return options.model_validate(mine)


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
        return self._told(job, metrics, failure)

    def give_up(self, job: Job, reason: str) -> Run:
        """Report a run that cannot be executed."""
        return self._told(job, None, reason)

    def _told(self, job: Job, metrics: dict[str, Any] | None, failure: str | None) -> Run:
        given = self._config.train.learning_rate if job.learning_rate is None else job.learning_rate
        rate = (metrics or {}).get("learning_rate", math.nan) if given == "auto" else given
        run = Run(job.contender, job.budget, job.seed, job.folder, rate, metrics, failure)
        self._done(run)
        return run


class Counter:
    """Reports runs as they end, from any thread; ``total`` is None for a sweep, whose number of runs is not known."""

    def __init__(self, total: int | None, note: Note) -> None:
        self.total, self.note = total, note
        self.done = 0
        self.lock = threading.Lock()

    def __call__(self, run: Run) -> None:
        with self.lock:
            self.done += 1
            number = f"sweep {self.done}" if self.total is None else f"run {self.done}/{self.total}"
            head = f"{number}: {run.contender}, {run.budget}, seed {run.seed}, learning rate {run.learning_rate:g}"
            if run.metrics is None or run.scores is None:
                self.note(f"{head}: {run.failure}")
            else:
                metric = run.metrics["metric"]
                self.note(f"{head}: {metric} {run.scores[metric]:.4f}")


def budgets_of(contender: Contender, comparison: Comparison) -> tuple[Budget, ...]:
    """Return all budgets, or only the first for a method without a budget."""
    return comparison.budgets if get_method(contender.method).is_budgeted else comparison.budgets[:1]


def job_of(
    folder: Path, comparison: Comparison, contender: Contender, budget: Budget, seed: int, learning_rate: float | None
) -> Job:
    """Return a run of the comparison, with its own folder in ``folder``."""
    limit = str(budget) if get_method(contender.method).is_budgeted else "no-budget"
    name = f"seed-{seed}" if learning_rate is None else f"seed-{seed}-rate-{learning_rate:g}"
    place = folder / _slug(contender) / limit.replace("%", "-percent") / name
    return Job(contender, budget, seed, learning_rate, place, comparison.keys)


def _slug(contender: Contender) -> str:
    return str(contender).replace(":", "-").replace("+", "-")


def run_command(config: Config, contents: Contents | None = None) -> Outcome:
    """Execute ``adapeft run`` in a separate process; see ``run_apart``."""
    return run_apart(config, _command, contents)


def run_apart(config: Config, execute: Callable[[Path, Path], int], contents: Contents | None = None) -> Outcome:
    """Execute a run in another process unless an earlier call has finished it; return metrics or reason of failure.

    Args:
        config: config of the run.
        execute: function that runs a config file in a separate process with all output to a log file, and returns the
            exit status.
        contents: function that returns the hashes of a run's inputs, to recognize a finished run; None hashes them
            anew.
    """
    place = Path(config.output)
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(place)
    try:
        if "after" in (content := load_metrics(folder.metrics)):
            folder.check_is_of(config, (contents or KnownContents())(config))
            return content, None
    except AdapeftError as error:
        return None, f"{REFUSED}{error}"
    # Not with_suffix: a learning rate in the name contains a point.
    settings, log = (place.with_name(f"{place.name}.{suffix}") for suffix in ("yaml", "log"))
    save_text(settings, to_yaml(config))
    status = execute(settings, log)
    if status == 0:
        return load_metrics(folder.metrics), None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    # A command prints its message last, and the message may have several lines.
    starts = [number for number, line in enumerate(lines) if line.startswith((REFUSED, "failed "))]
    said = lines[starts[-1] :] if starts else [f"it exited with status {status}:", *(lines or ["no output"])[-1:]]
    return None, f"{' '.join(map(str.strip, said))} (full log: {log})"


def _command(settings: Path, log: Path) -> int:
    command = [sys.executable, "-m", "cluster.cli", "run", str(settings)]
    with log.open("w") as output:
        return subprocess.run(command, stdout=output, stderr=output, check=False).returncode


def with_values(config: Config, section: str, **values: Any) -> Config:
    """Return the config with other ``values`` in one of its sections."""
    tree = config.model_dump()
    return Config.model_validate({**tree, section: {**tree[section], **values}})

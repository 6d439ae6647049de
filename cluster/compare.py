"""``adapeft compare``: every method at every budget under every seed, each run an ``adapeft run`` of its own.

A run that is finished is not run again, and one that fails is reported and loses nothing of the others.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pydantic import ValidationError

from adapeft.artifact import save, save_text
from adapeft.choose.budget import Budget
from adapeft.config import Config, Select
from adapeft.config_file import to_yaml
from adapeft.errors import AdapeftError
from adapeft.experiments import Comparison, Contender
from adapeft.inputs.data import load_rows, quiet
from adapeft.inputs.metrics import primary
from adapeft.methods import get_method
from cluster.metrics_file import load_metrics
from cluster.place import check_is_folder

_OF_SOME_METHODS = (
    *("rule", "scope", "solver", "joint", "lora_ranks", "placement"),
    *("curvature", "probe_steps", "probe_points", "probe_learning_rate"),
)

Note = Callable[[str], None]
Runner = Callable[[Config], tuple[dict[str, Any] | None, str | None]]
"""Runs a config; its metrics, or the reason why there are none."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        contender: its method.
        budget: its budget.
        seed: its seed.
        folder: where it goes.
        metrics: of the finished run; None when it failed.
        learning_rate: of its training.
        failure: why it failed.
    """

    contender: Contender
    budget: Budget
    seed: int
    folder: Path
    learning_rate: float
    metrics: dict[str, Any] | None = None
    failure: str | None = None

    @property
    def scores(self) -> dict[str, float] | None:
        """After the last step; the best evaluation would be chosen on the data that the scores are for."""
        return None if self.metrics is None else self.metrics["last"]


@dataclass(frozen=True)
class Job:
    """A run to make; ``learning_rate`` None leaves the config's."""

    contender: Contender
    budget: Budget
    seed: int
    learning_rate: float | None
    folder: Path

    def applied_to(self, config: Config) -> Config:
        """The config of this run."""
        config = Config.model_validate({**config.model_dump(), "select": self._select(config.select).model_dump()})
        if self.learning_rate is not None:
            config = _with(config, "train", learning_rate=self.learning_rate)
        return Config.model_validate({**config.model_dump(), "seed": self.seed, "output": str(self.folder)})

    def _select(self, settings: Select) -> Select:
        """The settings for this method; a key that is some other method's alone keeps its default here."""
        given = settings.model_dump(exclude=set(_OF_SOME_METHODS))
        mine = {**given, **self.contender.settings, "budget": self.budget, "memory_per_device": None}
        for key in _OF_SOME_METHODS:
            if key in self.contender.settings:
                continue
            with suppress(ValidationError):
                mine = Select.model_validate({**mine, key: getattr(settings, key)}).model_dump(include={*mine, key})
        return Select.model_validate(mine)


def compare(config: Config, comparison: Comparison, note: Note, run: Runner | None = None) -> list[Run]:
    """Sweeps the learning rates, then runs everything.

    Args:
        config: of every run, but for what is compared.
        note: is told of every run that ends.
        run: what runs one; ``run_command`` when None.
    """
    run = run or run_command
    folder = Path(config.output)
    rates = _swept_rates(config, comparison, note, run) if comparison.learning_rates else {}

    def jobs_of(contender: Contender, seed: int) -> list[Job]:
        return [
            Job(contender, budget, seed, rates.get((contender, budget)), _place(folder, contender, budget, seed))
            for budget in _budgets_of(contender, comparison)
        ]

    lines = [
        (_perturbed(config, comparison.perturb, seed, folder / "data"), jobs_of(contender, seed))
        for seed in comparison.seeds
        for contender in comparison.methods
    ]
    return _run_lines(lines, comparison.parallel, note, run, "run")


def _run_lines(
    lines: Sequence[tuple[Config, Sequence[Job]]], parallel: int, note: Note, run: Runner, what: str
) -> list[Run]:
    """Runs every line's jobs one after the other, all choosing from the first one's statistics; ``parallel`` lines at
    once."""
    done = _Counter(sum(len(jobs) for _, jobs in lines), note, what)

    def run_line(config: Config, jobs: Sequence[Job]) -> list[Run]:
        found: list[Run] = []
        for job in jobs:
            settings = job.applied_to(config)
            measured = next((earlier.folder for earlier in found if earlier.failure is None), None)
            if measured is not None:
                settings = _with(settings, "select", statistics=str(measured))
            metrics, failure = run(settings)
            found.append(
                Run(job.contender, job.budget, job.seed, job.folder, settings.train.learning_rate, metrics, failure)
            )
            done(found[-1])
        return found

    with ThreadPoolExecutor(parallel) as pool:
        return [run for line in pool.map(lambda line: run_line(*line), lines) for run in line]


def _budgets_of(contender: Contender, comparison: Comparison) -> Sequence[Budget]:
    """All budgets, or the first alone for a method that knows none."""
    return comparison.budgets if get_method(contender.method).is_budgeted else comparison.budgets[:1]


def _swept_rates(
    config: Config, comparison: Comparison, note: Note, run: Runner
) -> dict[tuple[Contender, Budget], float]:
    """For each method and budget the learning rate that is best on a held-out part of the training data.

    At the first seed; the evaluation data takes no part in it. Where scores are equal, as of models that all predict
    the majority, the lower loss wins.
    """
    folder = Path(config.output)
    rows = load_rows(config.data.train, "data.train")
    parts = rows.train_test_split(test_size=comparison.tune_fraction, seed=config.seed)
    train, held_out = (_written(parts[name], folder / "data" / f"sweep-{name}.jsonl") for name in ("train", "test"))
    tuning = _with(config, "data", train=str(train), evaluation=str(held_out))
    metric, higher_is_better = _primary(config)

    def jobs_of(contender: Contender) -> list[Job]:
        return [
            Job(contender, budget, comparison.seeds[0], rate, place.with_name(f"{rate:g}"))
            for budget in _budgets_of(contender, comparison)
            for place in [_place(folder / "sweep", contender, budget, 0)]
            for rate in comparison.learning_rates
        ]

    def rank(swept: Run) -> tuple[float, float]:
        if swept.scores is None:
            return -math.inf, -math.inf
        return swept.scores[metric] * (1 if higher_is_better else -1), -swept.scores["loss"]

    lines = [(tuning, jobs_of(contender)) for contender in comparison.methods]
    best: dict[tuple[Contender, Budget], Run] = {}
    for swept in _run_lines(lines, comparison.parallel, note, run, "sweep"):
        key = (swept.contender, swept.budget)
        best[key] = max(best.get(key, swept), swept, key=rank)
    return {key: swept.learning_rate for key, swept in best.items()}


def _primary(config: Config) -> tuple[str, bool]:
    from adapeft.inputs.data import describe

    return primary(config.data.metric, config.model.task, describe(config.data, config.model.task).is_regression)


def _perturbed(config: Config, fraction: float, seed: int, folder: Path) -> Config:
    """The config with a random part of the training data left out, as Table 2 of Fu et al. 2023 does."""
    if not fraction:
        return config
    rows = load_rows(config.data.train, "data.train")
    kept = np.random.default_rng([seed, 5]).permutation(len(rows))[round(fraction * len(rows)) :]
    path = _written(rows.select(np.sort(kept)), folder / f"seed-{seed}-without-{fraction:g}.jsonl")
    return _with(config, "data", train=str(path))


def _written(rows: Dataset, path: Path) -> Path:
    """JSON lines of ``rows``; the same rows give the same file, so one that is there stays."""
    if not path.is_file():
        with quiet():
            save(path, lambda temporary: rows.to_json(str(temporary), force_ascii=False))
    return path


def _with(config: Config, section: str, **values: Any) -> Config:
    tree = config.model_dump()
    return Config.model_validate({**tree, section: {**tree[section], **values}})


def _place(folder: Path, contender: Contender, budget: Budget, seed: int) -> Path:
    limit = str(budget) if get_method(contender.method).is_budgeted else "no-budget"
    return folder / _slug(contender) / limit.replace("%", "-percent") / f"seed-{seed}"


def _slug(contender: Contender) -> str:
    return str(contender).replace(":", "-").replace("+", "-")


def run_command(config: Config) -> tuple[dict[str, Any] | None, str | None]:
    """``adapeft run`` in a process of its own: metrics, or the reason of its failure."""
    place = Path(config.output)
    place.parent.mkdir(parents=True, exist_ok=True)
    metrics = place / "metrics.json"
    if "after" in (content := load_metrics(metrics)):
        return content, None
    # Not with_suffix: a learning rate is a name with a point in it.
    settings, log = (place.with_name(f"{place.name}.{suffix}") for suffix in ("yaml", "log"))
    save_text(settings, to_yaml(config))
    with log.open("w") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "cluster.cli", "run", str(settings)], stdout=output, stderr=output, check=False
        )
    if ended.returncode == 0:
        return load_metrics(metrics), None
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith(("error ", "failed "))]
    reason = reasons[-1] if reasons else f"it ended with status {ended.returncode}: {(lines or ['no output'])[-1]}"
    return None, f"{reason} (all of it: {log})"


class _Counter:
    """Tells of runs as they end, from any thread."""

    def __init__(self, total: int, note: Note, what: str = "run") -> None:
        self.total, self.note, self.what = total, note, what
        self.done = 0
        self.lock = threading.Lock()

    def __call__(self, run: Run) -> None:
        with self.lock:
            self.done += 1
            head = f"{self.what} {self.done}/{self.total}: {run.contender}, {run.budget}, seed {run.seed}"
            if run.metrics is None or run.scores is None:
                self.note(f"{head}: {run.failure}")
            else:
                metric = run.metrics["metric"]
                self.note(f"{head}, learning rate {run.learning_rate:g}: {metric} {run.scores[metric]:.4f}")


def check(config: Config, comparison: Comparison, inspect: Callable[[Config], Any]) -> None:
    """Inspects what every method asks for, before anything runs.

    Raises:
        AdapeftError: two runs would be one, or a method cannot serve the config at all; too small a budget is left to
            the run, for a comparison goes on without it.
    """
    check_is_folder(config.output, "compare")
    for name in ("methods", "seeds", "budgets", "learning_rates"):
        values = [str(value) for value in getattr(comparison, name)]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise AdapeftError(f"{name}: {twice[0]} is given twice. Name each once.")
    largest = max(comparison.budgets, key=lambda budget: budget.count(10**12))
    for contender in comparison.methods:
        inspect(Job(contender, largest, 0, None, Path(config.output)).applied_to(config))


def finished(runs: Sequence[Run]) -> bool:
    """Whether none has failed."""
    return all(run.failure is None for run in runs)

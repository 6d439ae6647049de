"""A run of a comparison: its config, folder and result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.finite import DIVERGED
from adapeft.methods.options import OPTIONS
from adapeft.methods.registry import get_method
from adapeft.model.load import describe_for
from adapeft.sections.budget import Budget
from adapeft.sections.section import together
from adapeft.sections.select import Select
from adapeft.tasks.registry import TASKS
from cluster.commands.compare.events import seconds_of_stages
from cluster.commands.compare.swept import Swept
from cluster.output.folder import RunFolder

Note = Callable[[str], None]
Outcome = tuple[dict[str, Any] | None, str | None]
"""Metrics of a run, or the reason why there are none."""
Runner = Callable[[Config], Outcome]

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
        swept: the sweep that found the learning rate, if any.
    """

    contender: Contender
    budget: Budget
    seed: int
    folder: Path
    learning_rate: float
    metrics: dict[str, Any] | None = None
    failure: str | None = None
    swept: Swept | None = None

    @property
    def scores(self) -> dict[str, float] | None:
        """Scores after the last step, because the best evaluation would be chosen on the data that is scored."""
        return None if self.metrics is None else self.metrics["last"]

    @property
    def seconds(self) -> float:
        """Seconds of choosing, searching and training; of an unfinished run, those of its stages so far."""
        if self.metrics is None:
            return seconds_of_stages(RunFolder(self.folder).events)
        return sum(self.metrics.get("seconds", {}).values())

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
        select = self._select(config.select)
        if TASKS[config.model.task].predicts_tokens:  # else auto might mean LoRA, which is another contender
            select = select.model_copy(update={"groups": select.granularity})
        mine = {"select": select.model_dump(), "train": train}
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


def budgets_of(contender: Contender, comparison: Comparison) -> tuple[Budget, ...]:
    """Return all budgets, or only the first for a method without a budget."""
    return comparison.budgets if get_method(contender.method).is_budgeted else comparison.budgets[:1]


def primary_metric(config: Config) -> tuple[str, bool]:
    """Return the name of the score that is compared, and whether a higher one is better."""
    metrics = TASKS[config.model.task].metrics(describe_for(config.model, config.data))
    return metrics.primary(config.data.metric)


def num_runs(comparison: Comparison) -> int:
    """Return the number of runs of a comparison, without those of a sweep."""
    return len(comparison.seeds) * sum(len(budgets_of(one, comparison)) for one in comparison.methods)


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


def with_values(config: Config, section: str, **values: Any) -> Config:
    """Return the config with other ``values`` in one of its sections."""
    tree = config.model_dump()
    return Config.model_validate({**tree, section: {**tree[section], **values}})

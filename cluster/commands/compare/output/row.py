"""A row of a comparison: one method at one budget, over all seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapeft.methods.registry import get_method
from adapeft.sections.select import Granularity
from cluster.commands.compare.run import Run
from cluster.commands.compare.swept import Swept


@dataclass(frozen=True)
class Row:
    """Results of one method at one budget.

    Attributes:
        method: contender as it is spelled.
        granularity: granularity of its groups.
        budget: budget as it is spelled; empty for a method without a budget.
        scores: seed → score after the last step, in the metric's own units.
        curves: seed → step → score at every evaluation.
        trained: number of parameters trained within the budget, mean over the seeds like the values below.
        delta_bytes: size of the delta.
        peak_bytes: largest memory of a rank during training.
        select_seconds: seconds of measuring and choosing; only choosing if another budget's statistics were reused.
        train_seconds: seconds of training.
        learning_rates: learning rates of training, one unless each run finds its own.
        failures: reasons of the failed runs.
        num_diverged: number of failed runs whose training diverged; they have no score, and count as the worst.
        swept: the sweep of the learning rate, if any.
        run_search_seconds: seconds in which a run searched its own learning rate.
    """

    method: str
    granularity: Granularity
    budget: str
    scores: dict[int, float]
    curves: dict[int, dict[int, float]]
    trained: float
    delta_bytes: float
    peak_bytes: float
    select_seconds: float
    train_seconds: float
    learning_rates: tuple[float, ...]
    failures: tuple[str, ...]
    num_diverged: int = 0
    swept: Swept | None = None
    run_search_seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return float(np.mean(list(self.scores.values()))) if self.scores else float("nan")

    @property
    def search_seconds(self) -> float:
        """Seconds in which the learning rate was searched: by all runs of the sweep, or by each run itself."""
        return self.run_search_seconds + (self.swept.seconds if self.swept else 0.0)

    @property
    def total_seconds(self) -> float:
        """Seconds to one trained delta: choosing, searching and training."""
        return self.select_seconds + self.search_seconds + self.train_seconds

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds; NaN for a single seed."""
        return float(np.std(list(self.scores.values()), ddof=1)) if len(self.scores) > 1 else float("nan")


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return one row per method and budget, in the order of the runs."""
    keys = dict.fromkeys((run.contender, run.budget) for run in runs)
    rows = []
    for contender, budget in keys:
        group = [run for run in runs if (run.contender, run.budget) == (contender, budget)]
        done = [run for run in group if run.metrics is not None]

        def mean(*path: str, default: float | None = None, done: list[Run] = done) -> float:
            return float(np.mean([_at(run.metrics, path, default) for run in done])) if done else float("nan")

        rows.append(
            Row(
                method=str(contender),
                granularity=contender.granularity,
                budget=str(budget) if get_method(contender.method).is_budgeted else "",
                scores={run.seed: run.scores[run.metrics["metric"]] for run in done if run.metrics and run.scores},
                curves={run.seed: _curve(run.metrics) for run in done if run.metrics},
                trained=mean("trainable_parameters"),
                delta_bytes=mean("delta_bytes"),
                peak_bytes=mean("peak_memory_bytes"),
                select_seconds=mean("seconds", "select"),
                train_seconds=mean("seconds", "train"),
                learning_rates=tuple(sorted({run.learning_rate for run in done})),
                failures=tuple(run.failure for run in group if run.failure is not None),
                num_diverged=sum(run.has_diverged for run in group),
                swept=group[0].swept,
                run_search_seconds=mean("seconds", "search", default=0.0),
            )
        )
    return rows


def _curve(metrics: dict[str, Any]) -> dict[int, float]:
    return {point["step"]: point[metrics["metric"]] for point in metrics["history"]}


def _at(tree: Any, path: Sequence[str], default: float | None) -> Any:
    """Return the value at the path; ``default`` for a last key that is missing, unless that is None."""
    *outer, last = path
    for key in outer:
        tree = tree[key]
    return tree[last] if default is None else tree.get(last, default)

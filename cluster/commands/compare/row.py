"""A row of a comparison: one method at one budget, over all seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapeft.methods.registry import get_method
from adapeft.sections.select import Granularity
from cluster.commands.compare.run import Run


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
        swept: learning rate → score on the held-out part of the training data, of the sweep.
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
    swept: Mapping[float, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return float(np.mean(list(self.scores.values()))) if self.scores else float("nan")

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

        def mean(*path: str, done: list[Run] = done) -> float:
            return float(np.mean([_at(run.metrics, path) for run in done])) if done else float("nan")

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
            )
        )
    return rows


def _curve(metrics: dict[str, Any]) -> dict[int, float]:
    return {point["step"]: point[metrics["metric"]] for point in metrics["history"]}


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree

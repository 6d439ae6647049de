"""The learning rate of each method in a comparison: the best of a few on a held-out part of the training data."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.model.load import describe_for
from adapeft.sections.budget import Budget
from adapeft.tasks.registry import TASKS
from cluster.commands.compare.examples import held_out
from cluster.commands.compare.run import Counter, Line, Note, Run, Runner, budgets_of, job_of
from cluster.run.climb import climb


class Swept(NamedTuple):
    """Result of a sweep for a method and budget.

    Attributes:
        rate: best learning rate.
        scores: learning rate → score, for all that were tried; not finite where there was none.
        failure: reason why even this rate led to no score, or None.
    """

    rate: float
    scores: dict[float, float]
    failure: str | None


_WORST = (-math.inf, -math.inf)


def swept_rates(
    config: Config, comparison: Comparison, note: Note, run: Runner
) -> dict[tuple[Contender, Budget], Swept]:
    """Return for each method and budget the best learning rate on a held-out part of the training data.

    The sweep uses the first seed and no evaluation data. It starts at the middle rate, or at the best rate of the
    previous budget, and climbs towards higher scores. If scores are equal, as for models that all predict the majority,
    the lower loss wins.
    """
    folder = Path(config.output)
    tuning = held_out(config, comparison.tune_fraction, folder / "data")
    metrics = TASKS[config.model.task].metrics(describe_for(config.model, config.data))
    metric, higher_is_better = metrics.primary(config.data.metric)
    rates = sorted(comparison.learning_rates)
    seed = comparison.seeds[0]
    done = Counter(None, note)

    def value(swept: Run) -> tuple[float, float]:
        if swept.scores is None:
            return _WORST
        values = swept.scores[metric] * (1 if higher_is_better else -1), -swept.scores["loss"]
        # A comparison with the NaN of a diverged training is never true, which would end the climb here.
        return values if all(map(math.isfinite, values)) else _WORST

    def best_run(line: Line, contender: Contender, budget: Budget, start: int) -> tuple[int, Run, dict[float, float]]:
        tried: dict[float, float] = {}

        @cache
        def run_at(index: int) -> Run:
            swept = line.run(job_of(folder / "sweep", comparison, contender, budget, seed, rates[index]))
            tried[rates[index]] = math.nan if swept.scores is None else swept.scores[metric]
            return swept

        is_refused = run_at(start).is_refused  # as it would be at any other rate
        best = start if is_refused else climb(lambda index: value(run_at(index)), start, len(rates))
        return best, run_at(best), dict(sorted(tried.items()))

    def sweep(contender: Contender) -> dict[tuple[Contender, Budget], Swept]:
        line, found = Line(tuning, run, done), {}
        index = len(rates) // 2
        for budget in budgets_of(contender, comparison):
            index, best, scores = best_run(line, contender, budget, index)
            has_score = value(best) != _WORST
            failure = None if has_score else best.failure or f"{metric} or loss was not finite"
            found[contender, budget] = Swept(rates[index], scores, failure)
        return found

    with ThreadPoolExecutor(comparison.parallel) as pool:
        return {key: swept for found in pool.map(sweep, comparison.methods) for key, swept in found.items()}

"""The learning rate of each method in a comparison: the best of a few on a held-out part of the training data."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.sections.budget import Budget
from cluster.commands.compare.counter import Counter
from cluster.commands.compare.examples import held_out
from cluster.commands.compare.line import Line
from cluster.commands.compare.machines.local import Machines
from cluster.commands.compare.run import Note, Run, budgets_of, job_of, primary_metric
from cluster.commands.compare.swept import WORST, Swept, value_of
from cluster.run.climb import climb


def swept_rates(
    config: Config, comparison: Comparison, note: Note, machines: Machines
) -> dict[tuple[Contender, Budget], Swept]:
    """Return for each method and budget the best learning rate on a held-out part of the training data.

    The sweep uses the first seed and no evaluation data. It starts at the middle rate, or at the best rate of the
    previous budget, and climbs towards higher scores. If scores are equal, as for models that all predict the majority,
    the lower loss wins.
    """
    folder = Path(config.output)
    tuning = held_out(config, comparison.tune_fraction, folder / "data")
    metric, higher_is_better = primary_metric(config)
    rates = sorted(comparison.learning_rates)
    seed = comparison.seeds[0]
    done = Counter(None, note)

    def value(swept: Run) -> tuple[float, float]:
        return WORST if swept.scores is None else value_of(swept.scores, metric, higher_is_better)

    def best_of(line: Line, contender: Contender, budget: Budget, start: int) -> tuple[int, Swept]:
        tried: list[Run] = []

        @cache
        def run_at(index: int) -> Run:
            tried.append(line.run(job_of(folder / "sweep", comparison, contender, budget, seed, rates[index])))
            return tried[-1]

        is_refused = run_at(start).is_refused  # as it would be at any other rate
        index = start if is_refused else climb(lambda index: value(run_at(index)), start, len(rates))
        best = run_at(index)
        failure = best.failure or f"{metric} or loss was not finite" if value(best) == WORST else None
        scores = {run.learning_rate: run.scores[metric] if run.scores else math.nan for run in tried}
        return index, Swept(rates[index], dict(sorted(scores.items())), failure, sum(run.seconds for run in tried))

    def sweep(contender: Contender) -> dict[tuple[Contender, Budget], Swept]:
        line, found = Line(tuning, machines.run, done), {}
        index = len(rates) // 2
        for budget in budgets_of(contender, comparison):
            index, found[contender, budget] = best_of(line, contender, budget, index)
        return found

    with machines.pool(len(comparison.methods)) as pool:
        return {key: swept for found in pool.map(sweep, comparison.methods) for key, swept in found.items()}

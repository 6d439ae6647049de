"""The learning rate of each method in a comparison: the best of a few on a held-out part of the training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.model.load import describe_for
from adapeft.sections.budget import Budget
from adapeft.tasks.registry import TASKS
from cluster.commands.compare.examples import held_out
from cluster.commands.compare.run import Counter, Line, Note, Run, Runner, budgets_of, job_of


class Swept(NamedTuple):
    """What a sweep found for a method and budget.

    Attributes:
        rate: the best learning rate.
        failure: why not even that led to a score; None where it did.
    """

    rate: float
    failure: str | None


_WORST = (-math.inf, -math.inf)


def swept_rates(
    config: Config, comparison: Comparison, note: Note, run: Runner
) -> dict[tuple[Contender, Budget], Swept]:
    """For each method and budget the learning rate that is best on a held-out part of the training data.

    At the first seed; the evaluation data takes no part in it. From the middle one on, and from the last budget's best
    at the next, towards where scores rise. Where they are equal, as of models that all predict the majority, the lower
    loss wins.
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
        # A comparison with NaN, of training that came apart, is never true, and would end the climb here.
        return values if all(map(math.isfinite, values)) else _WORST

    def best_run(line: Line, contender: Contender, budget: Budget, start: int) -> tuple[int, Run]:
        @cache
        def run_at(index: int) -> Run:
            return line.run(job_of(folder / "sweep", comparison, contender, budget, seed, rates[index]))

        is_refused = run_at(start).is_refused  # as it would be at any other rate
        best = start if is_refused else climb(lambda index: value(run_at(index)), start, len(rates))
        return best, run_at(best)

    def sweep(contender: Contender) -> dict[tuple[Contender, Budget], Swept]:
        line, found = Line(tuning, run, done), {}
        index = len(rates) // 2
        for budget in budgets_of(contender, comparison):
            index, best = best_run(line, contender, budget, index)
            has_score = value(best) != _WORST
            failure = None if has_score else best.failure or f"{metric} or loss was not finite"
            found[contender, budget] = Swept(rates[index], failure)
        return found

    with ThreadPoolExecutor(comparison.parallel) as pool:
        return {key: swept for found in pool.map(sweep, comparison.methods) for key, swept in found.items()}


def climb(score: Callable[[int], Any], start: int, count: int) -> int:
    """The index of the peak that is reached from ``start`` by steps to whichever neighbour scores best.

    A peak is above two on each side: one run is noisy, and what is above its neighbours alone may be no peak.

    Args:
        score: called once an index, for those on the way and around it alone.
        start: where to begin.
        count: of indices.
    """
    found = {start: score(start)}
    best = start
    while True:
        for step in (1, 2):
            for index in (best - step, best + step):
                if 0 <= index < count and index not in found:
                    found[index] = score(index)
            peak = max(found, key=found.__getitem__)
            if peak != best:
                best = peak
                break
        else:
            return best

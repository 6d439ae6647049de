"""The learning rate of each method in a comparison: the best of a few on a held-out part of the training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from adapeft.choose.budget import Budget
from adapeft.config import Config
from adapeft.experiments import Comparison, Contender
from adapeft.inputs.data import describe
from adapeft.inputs.metrics import primary
from cluster.compared_run import Counter, Line, Note, Runner, budgets_of, job_of
from cluster.data_parts import held_out


class Swept(NamedTuple):
    """What a sweep found for a method and budget.

    Attributes:
        rate: the best learning rate.
        failure: why no rate led to a score; None where one did.
    """

    rate: float
    failure: str | None


class _RefusedError(Exception):
    """A run will fail at any learning rate."""


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
    is_regression = describe(config.data, config.model.task).is_regression
    metric, higher_is_better = primary(config.data.metric, config.model.task, is_regression)
    rates = sorted(comparison.learning_rates)
    seed = comparison.seeds[0]
    done = Counter(None, note)

    def score(
        line: Line, contender: Contender, budget: Budget, failures: dict[int, str | None], index: int
    ) -> tuple[float, float]:
        swept = line.run(job_of(folder / "sweep", contender, budget, seed, rates[index]))
        failures[index] = swept.failure
        if swept.is_refused and len(failures) == 1:
            raise _RefusedError
        if swept.scores is None:
            return -math.inf, -math.inf
        values = swept.scores[metric] * (1 if higher_is_better else -1), -swept.scores["loss"]
        if all(map(math.isfinite, values)):
            return values
        # Training that came apart: a comparison with NaN is never true, and would end the climb here.
        failures[index] = f"{metric} or loss was not finite"
        return -math.inf, -math.inf

    def sweep(contender: Contender) -> dict[tuple[Contender, Budget], Swept]:
        line, best = Line(tuning, run, done), {}
        index = len(rates) // 2
        for budget in budgets_of(contender, comparison):
            failures: dict[int, str | None] = {}
            with suppress(_RefusedError):
                index = climb(partial(score, line, contender, budget, failures), index, len(rates))
            best[contender, budget] = Swept(rates[index], failures[index])
        return best

    with ThreadPoolExecutor(comparison.parallel) as pool:
        return {key: rate for best in pool.map(sweep, comparison.methods) for key, rate in best.items()}


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

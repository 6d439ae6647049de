"""The search for a learning rate, ``train.learning_rate: auto``: short trainings on a part of the training data."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from adapeft.errors import AdapeftError
from adapeft.subset.empty import check_not_empty
from adapeft.subset.subset import Subset
from cluster.inspection.plan import plan_training
from cluster.ranks.inputs import count_examples
from cluster.run.again import choose_again
from cluster.run.climb import climb
from cluster.run.session import Session

_RATES = tuple(float(f"{digit}e{exponent}") for exponent in range(-7, 2) for digit in (1, 3))
"""1e-7, 3e-7, 1e-6, … 30. In the sweeps of tests/benchmarks/results scores differ little within such a step."""
_STEP = math.sqrt(10)

_EXPONENT = 0.16
"""The best rate falls with the number of steps T, as T^-0.32 where trainings are long (Bjorck et al., "Scaling Optimal
LR Across Token Horizons", 2024). Adam's first steps are longer than later ones, whose gradients average out: from 8 or
11 steps to a whole training it falls as T^-0.25 (MiniLM on the docstrings) or T^-0.46 (STS-B, drawn elements), or rises
as T^0.3 (SmolLM2 on nl2bash)."""

_DIVERGING = 1.5
"""A loss above the best one by this factor comes from a rate that is too high, and higher ones are not tried. SmolLM2
has 1.6 times the loss of the best trial after 4 steps at 0.1, and 3.2 times after 8."""


def search_learning_rate(session: Session, subset: Subset) -> Subset:
    """Find the learning rate of the training from short ones, by what they reach on held-out training examples.

    Each trial has the schedule of the whole training, pressed into fewer steps. Where the choice depends on the reach
    of the training, it is made again for every rate, so that a rate is judged by the subset that would be trained with
    it. Trials are recorded in ``metrics.json`` as they end, and are not repeated.

    Args:
        session: session of the run, whose config has the rate found from here on.
        subset: the run's subset.

    Returns:
        The subset to train.

    Raises:
        AdapeftError: no rate gives a finite loss.
    """
    config = session.config
    plan = plan_training(config.train, count_examples(config, session.inspection.description))
    num_steps = _steps_of_trial(plan.num_steps)
    is_chosen_again = config.train.subset is None and config.select.depends_on_reach
    trials: dict[str, Any] = dict(session.metrics().get("trials", {}))

    def settle(rate: float) -> Subset:
        session.settle(rate)
        return choose_again(session) if is_chosen_again else subset

    @cache
    def score(index: int) -> float:
        rate = _RATES[index]
        if (key := f"{rate:g}") not in trials:
            trials[key] = _try(session, settle(rate), num_steps)
            session.record(trials=trials)
        name, loss = _judged(trials[key]["scores"])
        result = trials[key]["problem"] or f"{name} {loss:.4f}"
        session.terminal.note(f"search: learning rate {key}, {num_steps} steps: {result}")
        return -loss

    best = climb(score, _start(subset), len(_RATES), lambda low, best: low < _DIVERGING * best)
    if not math.isfinite(score(best)):
        raise AdapeftError(
            f"train.learning_rate = auto: none of the learning rates {', '.join(sorted(trials, key=float))} gives a "
            f"finite loss on held-out training examples: {trials[f'{_RATES[best]:g}']['problem']} If the rates are not "
            f"the reason, the data or the base model is; set train.learning_rate to a number to train with it."
        )
    steps = _vertex(*(-score(index) if 0 <= index < len(_RATES) else math.inf for index in (best - 1, best, best + 1)))
    rate = float(f"{_RATES[best] * _STEP**steps * (num_steps / plan.num_steps) ** _EXPONENT:.2g}")
    chosen = settle(rate)
    session.terminal.note(f"search: learning rate {rate:g}, from the best of {len(trials)} trials, {_RATES[best]:g}")
    return chosen


def _steps_of_trial(whole: int) -> int:
    """Return the steps of a trial: a sixteenth of a training of ``whole`` steps, or of a short one more, up to eight.

    Four or five trials suffice, so that they take a third of a long training and half of a short one. Of fewer than
    four steps a third or more would be warmup.
    """
    return min(whole, max(4, whole // 16, min(8, whole // 10)))


def _judged(scores: dict[str, float] | None) -> tuple[str, float]:
    """Return the name and value of what a trial should keep low: the loss, or of a regression 1 - r|r|.

    With Pearson's r, this is the share of the variance that no shift and scale of the predictions explains. Few steps
    of a regression mostly move the mean, which a whole training does at any rate: after 11 steps of STS-B losses are
    lowest at 3e-3 and correlations highest at 1e-2, where whole trainings are best from 8e-3 to 3e-2.
    """
    if scores is None:
        return "held-out loss", math.inf
    if "pearson" in scores:
        return "held-out unexplained variance", 1 - scores["pearson"] * abs(scores["pearson"])
    return "held-out loss", float(scores["loss"])


def _vertex(before: float, lowest: float, after: float) -> float:
    """Return where the parabola through three losses has its minimum, in steps from the lowest one; 0 if none has."""
    curvature = before - 2 * lowest + after
    return 0.5 * (before - after) / curvature if 0 < curvature < math.inf else 0.0


def _try(session: Session, subset: Subset, num_steps: int) -> dict[str, Any]:
    """Return the result of a trial of ``subset``; it has no score where nothing promises a lower loss."""
    from cluster.ranks.trial import try_learning_rate

    try:
        check_not_empty(subset)
    except AdapeftError as error:
        return {"scores": None, "problem": str(error)}
    return session.on_workers(try_learning_rate, "search", num_steps=num_steps)


def _start(subset: Subset) -> int:
    """Return the index of the rate that is tried first, from the fraction p of the model that is trained.

    The best rates of the sweeps in tests/benchmarks/results lie within a factor of six of 3e-4 / p^0.6: full training
    of MiniLM 5e-5 to 6e-4, 0.5 % 2e-3 to 3e-2, 0.01 % 3e-2 to 1.2e-1, 0.1 % of SmolLM2 1.6e-2 to 6.4e-2. A wrong start
    costs a trial per factor of 3.
    """
    total = subset.choice.num_total
    fraction = subset.count / total if total and subset.count else 1.0
    expected = 3e-4 / fraction**0.6
    return min(range(len(_RATES)), key=lambda index: abs(math.log(_RATES[index] / expected)))

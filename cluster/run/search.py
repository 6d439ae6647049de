"""The search for a learning rate, ``train.learning_rate: auto``: short trainings on a part of the training data."""

from __future__ import annotations

import math
from typing import Any

from adapeft.errors import AdapeftError
from adapeft.subset.empty import check_not_empty
from adapeft.subset.subset import Subset
from cluster.inspection.plan import plan_training
from cluster.ranks.inputs import count_examples
from cluster.run.again import choose_again
from cluster.run.rates import RATES, criterion, least_doubtful, refined, usual_rate
from cluster.run.session import Session


def search_learning_rate(session: Session, subset: Subset) -> Subset:
    """Find the learning rate of the training from short ones, by what they reach on held-out training examples.

    Each trial has the schedule of the whole training, pressed into fewer steps. ``doubt`` weighs its loss against the
    rate that is usual for as many parameters. Where the choice depends on the reach of the training, it is made again
    for every rate, so that a rate is judged by the subset that would be trained with it. Trials are recorded in
    ``metrics.json`` as they end, and are not repeated.

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
    before = session.metrics()
    trials: dict[str, Any] = dict(before.get("trials", {}))
    # A search that was interrupted has left the subset of its last trial.
    usual = float(before.get("usual_rate", usual_rate(subset)))
    session.record(usual_rate=usual)

    def settle(rate: float) -> Subset:
        session.settle(rate)
        return choose_again(session) if is_chosen_again else subset

    def loss_of(rate: float) -> float:
        key = f"{rate:g}"
        if trials.get(key, {}).get("steps") != num_steps:
            trials[key] = {"steps": num_steps} | _try(session, settle(rate), num_steps)
            session.record(trials=trials)
        name, loss = criterion(trials[key]["scores"])
        result = trials[key]["problem"] or f"{name} {loss:.4f}"
        session.terminal.note(f"search: learning rate {key}, {num_steps} steps: {result}")
        return loss

    best, doubts = least_doubtful(loss_of, usual)
    if not math.isfinite(doubts[best]):
        raise AdapeftError(
            f"train.learning_rate = auto: none of the learning rates {', '.join(sorted(trials, key=float))} gives a "
            f"finite loss on held-out training examples: {trials[f'{RATES[best]:g}']['problem']} If the rates are not "
            f"the reason, the data or the base model is; set train.learning_rate to a number to train with it."
        )
    rate = refined(best, doubts, num_steps / plan.num_steps)
    chosen = settle(rate)
    session.terminal.note(f"search: learning rate {rate:g}, from the best of {len(trials)} trials, {RATES[best]:g}")
    return chosen


def _steps_of_trial(whole: int) -> int:
    """Return the steps of a trial: a tenth of a training, of which three to five suffice.

    With fewer the lowest losses are those of too high rates: LoRA on the docstrings (132 steps) reaches 0.584 at the
    rate of trials of 8 steps, and 0.604 at that of 13. Of fewer than four a third or more would be warmup.
    """
    return min(whole, max(4, whole // 10))


def _try(session: Session, subset: Subset, num_steps: int) -> dict[str, Any]:
    """Return the result of a trial of ``subset``; it has no score where nothing promises a lower loss."""
    from cluster.ranks.trial import try_learning_rate

    try:
        check_not_empty(subset)
    except AdapeftError as error:
        return {"scores": None, "problem": str(error)}
    return session.on_workers(try_learning_rate, "search", num_steps=num_steps)

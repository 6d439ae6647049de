"""Trials of Ray Tune, which stops those that are behind by successive halving (ASHA, Li et al. 2020).

What Tune writes is in a temporary folder and never read: runs resume from their own folders.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ray.tune import (
    Callback,
    CheckpointConfig,
    FailureConfig,
    PlacementGroupFactory,
    RunConfig,
    TuneConfig,
    Tuner,
    grid_search,
    with_resources,
)
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from cluster.commands.compare.halving.trial import Trial, Tried
from cluster.commands.compare.machines.on_ray import RayMachines

REDUCTION = 3
"""Of the trials that reach a rung, about one in three continues."""


class Ended(NamedTuple):
    """The end of a trial.

    Attributes:
        step: step of its last evaluation.
        score: score of this evaluation; NaN if there was none.
        loss: loss of this evaluation.
        status: exit status of its process; None if it was stopped because it was behind.
        failure: reason why there is none, if the trial was lost.
    """

    step: int
    score: float
    loss: float
    status: int | None
    failure: str | None = None


def run_trials(
    tried: Sequence[Tried],
    first: int,
    higher_is_better: bool,
    machines: RayMachines,
    on_end: Callable[[int, Ended], None],
) -> None:
    """Run the trials where there is room.

    Args:
        tried: what to run, in this order.
        first: step of the first rung; each one after it is at ``REDUCTION`` times the step of the one before.
        higher_is_better: whether a higher score is better.
        machines: where to run them.
        on_end: function that is called with number and end of every trial that ends.
    """
    metric, num_steps = tried[0].metric, tried[0].num_steps
    mode = "max" if higher_is_better else "min"

    def halving() -> ASHAScheduler:
        # Beyond the last step: a trial that gets there ends by itself, once its run has written its results.
        end = num_steps + 1
        return ASHAScheduler("step", metric, mode, max_t=end, grace_period=first, reduction_factor=REDUCTION)

    # Otherwise Tune would turn Ctrl-C into an ordinary end, write logs of its own for every trial, and print tables.
    os.environ.update(TUNE_DISABLE_SIGINT_HANDLER="1", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # ``on_end`` gets the errors of trials
    with TemporaryDirectory(prefix="adapeft-") as folder:
        Tuner(
            with_resources(Trial, PlacementGroupFactory([machines.resources])),
            param_space={"number": grid_search(list(range(len(tried)))), "all": [one._asdict() for one in tried]},
            tune_config=TuneConfig(
                metric=metric,
                mode=mode,
                scheduler=_ByGroup(tried, halving),
                max_concurrent_trials=machines.at_once,
            ),
            run_config=RunConfig(
                name="trials",
                storage_path=folder,
                callbacks=[_OnEnd(on_end, metric)],
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # runs have checkpoints of their own
                failure_config=FailureConfig(max_failures=machines.retries),
                verbose=0,
            ),
        ).fit()


class _ByGroup(FIFOScheduler):
    """Successive halving among the trials of each group."""

    def __init__(self, tried: Sequence[Tried], halving: Callable[[], ASHAScheduler]) -> None:
        super().__init__()
        self._group_of = [one.group for one in tried]
        self._halving = {group: halving() for group in set(self._group_of)}

    def _of(self, trial: Any) -> ASHAScheduler:
        return self._halving[self._group_of[trial.config["number"]]]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True  # each group's scheduler has them

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


class _OnEnd(Callback):
    """Reports trials as they end."""

    def __init__(self, on_end: Callable[[int, Ended], None], metric: str) -> None:
        self._on_end, self._metric = on_end, metric

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what another process would need to resume the trials, which none does

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        self._on_end(trial.config["number"], Ended(last["step"], last[self._metric], last["loss"], last["status"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else "its machine is gone"
        lines = [line for line in text.splitlines() if line.strip()]
        self._on_end(trial.config["number"], Ended(0, float("nan"), float("nan"), 1, f"failed {lines[-1]}"))

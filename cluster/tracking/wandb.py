"""Weights & Biases; its environment variables, such as ``WANDB_PROJECT`` and ``WANDB_MODE``, keep their meaning."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cluster.tracking.tracker import TrackedRun

_STEP = "train/global_step"  # as the Trainer of transformers names it, so that both appear in one chart


class Wandb:
    """A run of Weights & Biases."""

    def start(self, run: TrackedRun) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "adapeft"),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.known,
            resume=None if run.known is None else "allow",
            config=dict(run.config),
            allow_val_change=True,  # a resumed run may have another cluster section
        )
        # A run that resumes from a checkpoint repeats steps, which W&B's own counter would refuse.
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP, step_sync=True)
        return self._run.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, _STEP: step})

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

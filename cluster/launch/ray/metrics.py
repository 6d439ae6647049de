"""Ray metrics of a run, for Prometheus, Grafana and other monitoring of the cluster."""

from __future__ import annotations

import time
from typing import Any

from ray.util.metrics import Gauge

from adapeft.config.config import Config
from adapeft.tasks.registry import TASKS

TAGS = ("run", "model", "method", "stage")

METRICS = {
    "adapeft_progress_ratio": "completed fraction of a pass, an evaluation or the training",
    "adapeft_throughput_steps_per_second": "calibration batches, optimizer steps or evaluation batches per second",
    "adapeft_throughput_examples_per_second": "training examples per second, over all workers",
    "adapeft_throughput_tokens_per_second": "training tokens per second of language models, over all workers",
    "adapeft_training_loss": "mean training loss of the steps since the previous log entry",
    "adapeft_learning_rate": "learning rate of the last step",
    "adapeft_evaluation_loss": "mean loss over the evaluation data",
    "adapeft_evaluation_score": "value of the metric that decides which evaluation is the best",
    "adapeft_budget_parameters": "largest number of trainable parameters",
    "adapeft_trainable_parameters": "number of parameters chosen within the budget",
    "adapeft_influence_loss": "predicted decrease of the loss",
    "adapeft_gap_ratio": "relative gap between the value of the choice and its upper bound",
    "adapeft_memory_peak_bytes": "largest peak memory of any worker, known when a stage ends",
}
"""Description of each metric. Prometheus adds the prefix ``ray_``; all have ``TAGS``, some ``_MORE_TAGS``."""

_MORE_TAGS = {
    "adapeft_progress_ratio": ("step",),
    "adapeft_throughput_steps_per_second": ("step",),
    "adapeft_evaluation_score": ("metric",),
}
_PEAKS = {"measure": "measuring_peak_memory_bytes", "train": "peak_memory_bytes"}
_LEAST_SECONDS = 0.05


class Metrics:
    """Gauges of one run; Ray must be initialized.

    Args:
        config: config of the run.
        run_id: its identity.
    """

    def __init__(self, config: Config, run_id: str) -> None:
        self.config = config
        tags = {"run": run_id, "model": config.model.name, "method": config.select.method}
        self._gauges = {
            name: Gauge(name, description, tag_keys=TAGS + _MORE_TAGS.get(name, ())).set_default_tags(tags)
            for name, description in METRICS.items()
        }
        self._rate = _Rate()

    def __call__(self, event: dict[str, Any]) -> None:
        """Set the gauges for an event of rank 0, which includes its stage."""
        stage, step = event["stage"], event["step"]
        if event.get("total"):
            self._set("progress_ratio", event["done"] / event["total"], stage, step=step)
        rate = self._rate.after(event)
        if rate is not None:
            self._set("throughput_steps_per_second", rate, stage, step=step)
        if step == "training":
            self._set("training_loss", event["loss"], stage)
            self._set("learning_rate", event["lr"], stage)
            if rate is not None:
                self._set_throughput(rate * self.config.train.batch_size, stage)
        elif step == "evaluated":
            self._set("evaluation_loss", event["loss"], stage)
            self._set("evaluation_score", event[event["metric"]], stage, metric=event["metric"])

    def record(self, content: dict[str, Any]) -> None:
        """Set the gauges for ``metrics.json``: the choice, and the peak memory of stages that have ended."""
        if "choice" in content:
            choice = content["choice"]
            self._set("trainable_parameters", content["trainable_parameters"], "choose")
            for name, key in (("budget_parameters", "budget"), ("influence_loss", "value"), ("gap_ratio", "gap")):
                if choice[key] is not None:
                    self._set(name, choice[key], "choose")
        for stage, key in _PEAKS.items():
            if content.get(key) is not None:
                self._set("memory_peak_bytes", content[key], stage)

    def _set_throughput(self, examples: float, stage: str) -> None:
        self._set("throughput_examples_per_second", examples, stage)
        if TASKS[self.config.model.task].packs_texts:  # examples are full blocks of max_length tokens
            self._set("throughput_tokens_per_second", examples * self.config.data.max_length, stage)

    def _set(self, name: str, value: float, stage: str, **tags: str) -> None:
        self._gauges[f"adapeft_{name}"].set(value, tags={"stage": stage, **tags})


class _Rate:
    """Steps per second between two events; the time of evaluations does not count as training."""

    def __init__(self) -> None:
        self._time = 0.0
        self._done: dict[str, int] = {}

    def after(self, event: dict[str, Any]) -> float | None:
        """Return the rate of the event's step, or None if it cannot be derived from the previous event."""
        step, now = event["step"], time.monotonic()
        if step in ("evaluated", "resuming"):  # the next training step follows immediately
            self._done["training"], self._time = event["at" if step == "evaluated" else "done"], now
            return None
        done, seconds = event.get("done", 0), now - self._time
        more = done - self._done.get(step, done)
        if more > 0 and seconds < _LEAST_SECONDS:  # both events were queued
            return None
        self._done[step], self._time = done, now
        return more / seconds if more > 0 else None

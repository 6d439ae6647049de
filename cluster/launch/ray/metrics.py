"""A run as Ray metrics: what whoever watches the cluster, with Prometheus and Grafana or otherwise, sees of it."""

from __future__ import annotations

import time
from typing import Any

from ray.util.metrics import Gauge

from adapeft.config.config import Config
from adapeft.tasks.registry import TASKS
from cluster.output.identity import run_id

TAGS = ("run", "model", "method", "stage")

METRICS = {
    "adapeft_progress_ratio": "done of a pass, an evaluation or of training",
    "adapeft_throughput_steps_per_second": "calibration batches, optimizer steps or evaluation batches",
    "adapeft_throughput_examples_per_second": "of training, over all workers",
    "adapeft_throughput_tokens_per_second": "of training, over all workers; of language models",
    "adapeft_training_loss": "mean over the steps since it was logged last",
    "adapeft_learning_rate": "of the last step",
    "adapeft_evaluation_loss": "mean over the evaluation data",
    "adapeft_evaluation_score": "of the metric that chooses the best evaluation",
    "adapeft_budget_parameters": "most that may be trained",
    "adapeft_trainable_parameters": "chosen within the budget",
    "adapeft_influence_loss": "predicted decrease of the loss",
    "adapeft_gap_ratio": "how far the choice may be from the best, as a share of the bound",
    "adapeft_memory_peak_bytes": "most that any worker held, known when a stage ends",
}
"""Name → what it is. Prometheus has them with ``ray_`` in front; ``TAGS`` are on all, ``_MORE_TAGS`` on some."""

_MORE_TAGS = {
    "adapeft_progress_ratio": ("step",),
    "adapeft_throughput_steps_per_second": ("step",),
    "adapeft_evaluation_score": ("metric",),
}
_PEAKS = {"measure": "measuring_peak_memory_bytes", "train": "peak_memory_bytes"}
_LEAST_SECONDS = 0.05


class Metrics:
    """Sets the gauges of one run; Ray has to be there."""

    def __init__(self, config: Config) -> None:
        self.config = config
        tags = {"run": run_id(config), "model": config.model.name, "method": config.select.method}
        self._gauges = {
            name: Gauge(name, description, tag_keys=TAGS + _MORE_TAGS.get(name, ())).set_default_tags(tags)
            for name, description in METRICS.items()
        }
        self._rate = _Rate()

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event of rank 0, with its stage."""
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
        """Takes what ``metrics.json`` holds so far: the choice, and the memory of the stages that have ended."""
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
        if TASKS[self.config.model.task].packs_texts:  # examples are full blocks of this length
            self._set("throughput_tokens_per_second", examples * self.config.data.max_length, stage)

    def _set(self, name: str, value: float, stage: str, **tags: str) -> None:
        self._gauges[f"adapeft_{name}"].set(value, tags={"stage": stage, **tags})


class _Rate:
    """Steps a second from one event to the next; an evaluation in the midst of training takes none of its time."""

    def __init__(self) -> None:
        self._time = 0.0
        self._done: dict[str, int] = {}

    def after(self, event: dict[str, Any]) -> float | None:
        """Of the event's step; None where the event before it says nothing of the time that it took."""
        step, now = event["step"], time.monotonic()
        if step in ("evaluated", "resuming"):  # the next step of training follows at once
            self._done["training"], self._time = event["at" if step == "evaluated" else "done"], now
            return None
        done, seconds = event.get("done", 0), now - self._time
        more = done - self._done.get(step, done)
        if more > 0 and seconds < _LEAST_SECONDS:  # the two have waited in the queue
            return None
        self._done[step], self._time = done, now
        return more / seconds if more > 0 else None

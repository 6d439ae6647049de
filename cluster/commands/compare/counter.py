"""A line for every run of a comparison that ends."""

from __future__ import annotations

import threading

from cluster.commands.compare.run import Note, Run


class Counter:
    """Reports runs as they end, from any thread; ``total`` is None for a sweep, whose number of runs is not known."""

    def __init__(self, total: int | None, note: Note) -> None:
        self.total, self.note = total, note
        self.done = 0
        self.lock = threading.Lock()

    def __call__(self, run: Run) -> None:
        with self.lock:
            self.done += 1
            number = f"sweep {self.done}" if self.total is None else f"run {self.done}/{self.total}"
            head = f"{number}: {run.contender}, {run.budget}, seed {run.seed}, learning rate {run.learning_rate:g}"
            if run.metrics is None or run.scores is None:
                self.note(f"{head}: {run.failure}")
            else:
                metric = run.metrics["metric"]
                self.note(f"{head}: {metric} {run.scores[metric]:.4f}")

"""Short runs, and a check of those that differ only in the ZeRO stage and the number of workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import adapeft

TWELVE_STEPS = (
    "calibration=32",
    "max_steps=12",
    "train.batch_size=8",
    "learning_rate=1e-2",
    "save_steps=4",
    "eval_steps=4",
    "logging_steps=1",
)
"""Overrides of a training with three checkpoints, each after an evaluation."""


def run_locally(config: str, output: Path, *overrides: str) -> dict[str, Any]:
    """Run a config on local workers and return its metrics."""
    done = adapeft("run", config, "cluster.launcher=local", f"output={output}", *overrides)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "metrics.json").read_text())


def check_stages(
    run: Callable[..., dict[str, Any]],
    out: Path,
    *overrides: str,
    settings: Sequence[tuple[int, int]] = ((0, 1), (1, 2), (2, 2)),
    kept: float = 0.98,
    same: Sequence[str] = (),
) -> None:
    """Check that five steps train the same under ZeRO-3 with two workers and under other settings.

    Args:
        run: function of the output folder and of overrides that returns the metrics of a run.
        out: folder for the outputs.
        overrides: overrides of all runs.
        settings: ZeRO stages with numbers of workers.
        kept: fraction of the loss before training below which that after it is.
        same: metrics before training that are equal, besides the loss.
    """
    one = run(out / "one", "train.max_steps=5", *overrides, "zero_stage=3", "cluster.workers=2")
    for zero_stage, workers in settings:
        options = ("train.max_steps=5", *overrides, f"zero_stage={zero_stage}", f"cluster.workers={workers}")
        other = run(out / str(zero_stage), *options)
        assert other["before"]["loss"] == pytest.approx(one["before"]["loss"], rel=1e-5)
        assert all(other["before"][name] == one["before"][name] for name in same)
        assert other["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-3)
        assert other["after"]["loss"] < kept * other["before"]["loss"]

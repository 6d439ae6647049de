"""Short runs that differ only in the ZeRO stage and the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


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

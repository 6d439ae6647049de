"""Diverging training ends with advice; the last good checkpoint is kept, and no delta is written."""

from __future__ import annotations

import json
import math

import pytest

from adapeft.files.artifact import load_tensors
from adapeft.finite import DIVERGED, is_finite
from tests.support.checkpoints import WITHOUT_DROPOUT, write_bert, write_config, write_lines
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks

OPTIONS = ["method=random", "groups=row", "budget=20%", "calibration=16", "train.batch_size=8", "warmup_ratio=0"]
BAD_ROW = 21


@pytest.fixture
def regression(tmp_path):
    """A config with 40 rows and targets of about 1, except one whose square overflows float32; 5 steps per epoch."""
    rows = [
        {"text": f"the {word} sky is {word}", "label": 0.1 * number} for number, word in enumerate(["old", "new"] * 20)
    ]
    write_lines(tmp_path / "validation.jsonl", rows[:9])
    rows[BAD_ROW]["label"] = 1e25
    write_lines(tmp_path / "train.jsonl", rows)
    base = write_bert(tmp_path / "base", **WITHOUT_DROPOUT)
    return write_config(tmp_path / "run.yaml", base, tmp_path / "train.jsonl", tmp_path / "validation.jsonl")


def run(world_size, config, folder, *options):
    run_on_ranks(world_size, "tests.on_ranks.finetune", 0, config, *OPTIONS, *options, f"output={folder}")
    said = [(folder / f"error-{rank}.txt") for rank in range(world_size)]
    return [path.read_text() for path in said if path.exists()]


def test_too_high_a_learning_rate(config, tmp_path):
    """Two ranks, and the same run again, give the same message; saved values are finite."""
    folder = tmp_path / "run"
    options = ["learning_rate=1e30", "max_steps=8", "save_steps=1", "eval_steps=8", "logging_steps=1"]
    said = run(2, config, folder, *options)
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0].startswith(DIVERGED)
    assert "train.learning_rate" in said[0]
    assert not (folder / "delta.safetensors").exists()
    assert not (folder / "result.json").exists()
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        assert all(map(is_finite, load_tensors(path, "training checkpoint")[0].values()))
    assert run(2, config, folder, *options) == said


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_one_bad_row_is_named_or_skipped(regression, tmp_path, zero_stage):
    options = ["max_steps=10", "eval_steps=5", "save_steps=1", "logging_steps=1", f"zero_stage={zero_stage}"]
    (said,) = run(1, regression, tmp_path / "stopped", *options)
    assert said.startswith(f"{DIVERGED} at step ")
    assert f"the loss is inf. It comes from example {BAD_ROW} of data.train (counted from 0)." in said
    step = int(said.removeprefix(f"{DIVERGED} at step ").split()[0])
    kept = [path.name for path in (tmp_path / "stopped" / "checkpoints").glob("step-*")]
    assert kept == ([f"step-{step - 1}"] if step > 1 else [])
    assert not (tmp_path / "stopped" / "delta.safetensors").exists()

    assert not run(1, regression, tmp_path / "skipped", *options, "max_skipped_steps=2")
    text = (tmp_path / "skipped" / "result.json").read_text()
    result = json.loads(text, parse_constant=pytest.fail)
    assert [(one["step"] - 1) // 5 for one in result["skipped_steps"]] == [0, 1], "once an epoch"
    assert all(one["examples"] == [BAD_ROW] and one["problem"] == "the loss is inf" for one in result["skipped_steps"])
    assert math.isfinite(result["last"]["loss"])

    (said,) = run(1, regression, tmp_path / "once", *options, "max_skipped_steps=1")
    assert "after 1 skipped step" in said


def test_an_evaluation_that_is_not_finite_is_no_score(regression, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    rows[4]["label"] = -1e25
    write_lines(tmp_path / "validation.jsonl", rows)
    (said,) = run(1, regression, tmp_path / "run", "max_steps=2")
    assert said.startswith(
        "before training: the loss of 1 of the 9 examples of data.evaluation is not finite: 4 (counted"
    )

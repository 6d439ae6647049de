"""A run on a stream through the command: what it prints and records, and what it refuses afterwards."""

from __future__ import annotations

import json

import pytest

from tests.support.checkpoints import adapeft, write_gpt2, write_text

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_a_run_on_a_stream(tmp_path):
    """The ready config on 100 blocks of text, of which twelve steps take nearly two passes."""
    train, evaluation = write_text(tmp_path / "train.txt", 1600), write_text(tmp_path / "validation.txt", 330)
    run = tmp_path / "run"
    config = ("deploy/configs/wikitext2.yaml", f"model.name={write_gpt2(tmp_path / 'base')}", f"data.train={train}")
    config += (f"data.evaluation={evaluation}", "max_length=16", "max_steps=12", "eval_steps=6", "save_steps=6")
    config += ("calibration=32", "cluster.launcher=local", "data.shuffle_buffer=50", "evaluation_examples=20")
    done = adapeft("run", *config, "data.streaming=true", f"output={run}")
    assert done.returncode == 0, done.stderr
    assert "streamed training texts, 20 evaluation texts" in " ".join(done.stdout.split())
    assert "train.txt as a stream" in done.stdout
    assert "data.train is exhausted after 160 rows; pass 2 over it begins" in done.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["stream"] == {"passes": 2, "rows": 320, "made": 200, "examples": 180, "truncated": 0}
    assert metrics["after"]["loss"] < metrics["before"]["loss"]

    again = adapeft("run", *config, "data.streaming=true", f"output={run}")
    assert "training: already done" in again.stdout, again.stderr
    choice = ("select.statistics=" + str(run), f"output={tmp_path / 'other'}")
    whole = adapeft("select", *config[:-2], "cluster.launcher=local", *choice)
    assert whole.returncode == 2
    assert "data.streaming: false here, true there" in whole.stderr
    with train.open("a") as file:
        file.write("the sea\n")
    changed = adapeft("run", *config, "data.streaming=true", f"output={run}")
    assert changed.returncode == 2
    assert f"data.train = {train}: content" in " ".join(changed.stderr.split())
    validated = adapeft("validate", *config, "data.streaming=true", f"output={tmp_path / 'validated'}")
    assert "data.streaming = true: validate trains on batches" in " ".join(validated.stderr.split())
    assert not (tmp_path / "validated").exists()

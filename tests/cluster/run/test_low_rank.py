"""A run measured through windows of low rank, through the command and DeepSpeed."""

from __future__ import annotations

import json

import pytest

from adapeft.measure.storage import load_groups
from tests.support.checkpoints import adapeft, write_bert, write_colours, write_config

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

LOW_RANK = ("measure=low-rank", "rank=4", "cluster.launcher=local")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config of a finished selection, and its folder."""
    folder = tmp_path_factory.mktemp("low-rank")
    config = write_config(folder / "run.yaml", write_bert(folder / "base"), *write_colours(folder))
    done = adapeft("select", config, *LOW_RANK, f"output={folder / 'low'}")
    assert done.returncode == 0, done.stderr
    return config, folder / "low"


def test_statistics_are_reused_by_the_same_measurement_alone(run, tmp_path):
    config, low = run
    key = load_groups(low)[2]
    assert {key["select.measure"], key["select.rank"]} == {"low-rank", 4}
    again = [f"select.statistics={low}", f"output={tmp_path / 'again'}"]
    done = adapeft("select", config, *LOW_RANK, *again, "budget=10%")
    assert done.returncode == 0, done.stderr
    for other, said in (
        (("measure=low-rank", "rank=3"), "select.rank: 3 here, 4 there"),
        (("measure=exact",), "select.measure: exact here, low-rank there"),
        ((), "select.measure: exact here, low-rank there"),
    ):
        done = adapeft("select", config, *other, *again, f"output={tmp_path / 'other'}", "cluster.launcher=local")
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_with_gradient_checkpointing(run, tmp_path, zero_stage):
    config, low = run
    coarse = ["dtype=bfloat16", "gradient_checkpointing=true", "metric=loss", f"zero_stage={zero_stage}"]
    done = adapeft("run", config, *LOW_RANK, *coarse, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["after"]["loss"] < 0.7 * metrics["before"]["loss"]
    assert load_groups(tmp_path / "run")[1]["slope"].shape == load_groups(low)[1]["slope"].shape

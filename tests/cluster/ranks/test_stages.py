"""Stages one after another on the same workers."""

from __future__ import annotations

import pytest

from adapeft.config.load import load_config
from cluster.launch.opening import open_launcher
from cluster.ranks.evaluate import evaluate
from cluster.ranks.finetune import finetune
from cluster.ranks.measure import measure_and_choose
from tests.on_ranks.functions import count_weights
from tests.support.checkpoints import write_bert, write_colours, write_config

pytestmark = pytest.mark.ranks


def test_no_stage_starts_with_the_weights_of_another(tmp_path):
    """At stage 3 DeepSpeed itself keeps a reference to every model."""
    path = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    config = load_config(path, ["cluster.launcher=local", "zero_stage=3", "train.max_steps=1"])
    with open_launcher(config.cluster, {"run": "mine-1"}) as launcher:
        for name, function, arguments in (
            ("measure", measure_and_choose, {}),
            ("train", finetune, {}),
            ("evaluate", evaluate, {"delta": None, "base": False}),
        ):
            launcher.run(function, config, name, print, **arguments)
            assert launcher.run(count_weights, config, "count", print) == {"elements": 0}, name

"""Methods with a rule through ``finetune``: scored and saved p-sparse, and resumed to the same result."""

from __future__ import annotations

import json

import pytest
import torch

import adapeft
from tests.support.checkpoints import WITHOUT_DROPOUT, write_bert, write_colours, write_config
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks

BUDGET = 300
OVERRIDES = [
    "method=diff-pruning",
    "select.rule={penalty: 1e-4, gate_start: 0.5}",
    f"budget={BUDGET}",
    "calibration=32",
    "max_steps=8",
    "train.batch_size=8",
    "learning_rate=1e-2",
    "save_steps=3",
    "eval_steps=2",
    "logging_steps=1",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_config(folder / "run.yaml", write_bert(folder / "base", **WITHOUT_DROPOUT), *write_colours(folder))


@pytest.mark.slow
def test_a_stopped_rule_resumes_on_one_worker_to_the_same_result(config, tmp_path):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={undisturbed}")
    run_on_ranks(2, "tests.on_ranks.finetune", 4, config, *OVERRIDES, f"output={stopped}")
    assert (stopped / "checkpoints" / "step-3").is_dir()
    run_on_ranks(1, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={stopped}", "zero_stage=1")

    results = [json.loads((folder / "result.json").read_text()) for folder in (undisturbed, stopped)]
    assert results[0]["best_step"] >= 4, "before the projection nothing is within the budget"
    for key in ("before", "after", "last"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-4, abs=1e-5)
    deltas = [adapeft.Delta.load(folder / "delta.safetensors") for folder in (undisturbed, stopped)]
    assert deltas[0].count == deltas[1].count == BUDGET
    for name, change in deltas[0].changes.items():
        assert torch.equal(deltas[1].changes[name].part.indices, change.part.indices)
        torch.testing.assert_close(deltas[1].changes[name].values, change.values, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_keeps_the_rule_on_its_float32_weights(config, tmp_path, zero_stage):
    child = ["method=child-pruning", "select.rule={projection_interval: 3}", "dtype=bfloat16", "max_steps=6"]
    overrides = [*OVERRIDES[2:], *child, f"zero_stage={zero_stage}", f"output={tmp_path}"]
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *overrides)
    assert adapeft.Delta.load(tmp_path / "delta.safetensors").count == BUDGET
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["last"]["loss"] != result["before"]["loss"]

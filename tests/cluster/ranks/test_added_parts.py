"""LoRA and adapters through ``finetune``: stopped and resumed to the same result, and in bf16."""

from __future__ import annotations

import json

import pytest
import torch

import adapeft
from tests.support.ranks import run_on_ranks
from tests.support.stages import TWELVE_STEPS

pytestmark = pytest.mark.ranks

OVERRIDES = ["budget=2000", *TWELVE_STEPS]
METHODS = {"lora": ["method=lora"], "adapter": ["method=adapter", "placement=houlsby"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_to_the_same_result(config, tmp_path, method):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    overrides = [*OVERRIDES, *METHODS[method]]
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *overrides, f"output={undisturbed}")
    run_on_ranks(2, "tests.on_ranks.finetune", 6, config, *overrides, f"output={stopped}")
    assert (stopped / "checkpoints" / "step-4").is_dir()
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *overrides, f"output={stopped}")

    results = [json.loads((folder / "result.json").read_text()) for folder in (undisturbed, stopped)]
    for key in ("before", "after", "last"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-4, abs=1e-5)
    deltas = [adapeft.Delta.load(folder / "delta.safetensors") for folder in (undisturbed, stopped)]
    assert {change.part.kind for change in deltas[0].changes.values()} == {method}
    for name, change in deltas[0].changes.items():
        pieces = change.part.split(change.values)
        assert pieces["lora_B" if method == "lora" else "up.weight"].abs().max() > 1e-3, "it started at zero"
        torch.testing.assert_close(deltas[1].changes[name].values, change.values, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "zero_stage"), [("lora", 1), ("lora", 3), ("adapter", 2), ("adapter", 3)])
def test_bf16_with_gradient_checkpointing(config, tmp_path, method, zero_stage):
    precision = ["dtype=bfloat16", "gradient_checkpointing=true", f"zero_stage={zero_stage}", "metric=loss"]
    overrides = [*OVERRIDES, *METHODS[method], *precision, "learning_rate=3e-2", "max_steps=40"]
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *overrides, f"output={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"]
    delta = adapeft.Delta.load(tmp_path / "delta.safetensors")
    values = torch.cat([change.values.flatten() for change in delta.changes.values()])
    assert not torch.equal(values, values.bfloat16().float()), "the master weights are float32"

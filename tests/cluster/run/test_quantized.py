"""A real model in nf4 through the command: rows and LoRA are trained, and the delta is applied and merged."""

from __future__ import annotations

import json

import pytest
import yaml

from deploy.demo.docstrings import collect, folder_of, model_folder, split, write
from tests.cluster.run.test_pipeline import text_of
from tests.support.checkpoints import adapeft

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

PACKAGES = ("numpy", "sympy", "torch", "transformers")
CASES = {"rows": ("groups=row", "learning_rate=3e-3"), "lora": ("method=lora", "learning_rate=3e-3")}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a config that classifies docstrings by package with MiniLM in nf4."""
    folder = tmp_path_factory.mktemp("minilm")
    train, evaluation = split(collect({name: folder_of(name) for name in PACKAGES}, per_package=150))
    write(folder / "train.jsonl", train)
    write(folder / "validation.jsonl", evaluation)
    content = {
        "model": {
            **{"name": str(model_folder()), "task": "sequence-classification", "quantization": "nf4"},
            "attn_implementation": "eager",
        },
        "data": {
            **{"train": str(folder / "train.jsonl"), "evaluation": str(folder / "validation.jsonl")},
            "max_length": 32,
        },
        "output": str(folder / "run"),
        "select": {"budget": "0.5%", "exclude": "*embeddings*", "calibration": 64},
        "train": {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16},
        "cluster": {"workers": 1, "zero_stage": 0, "launcher": "local"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def loss_of(text: str) -> float:
    """Return the loss that ``adapeft evaluate`` prints."""
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("loss ")))


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_on_nf4_applies_and_merges(case, config, tmp_path):
    same = [*CASES[case], f"output={tmp_path / 'run'}"]
    shown = text_of(adapeft("run", config, *same))
    assert "--unquantized --evaluate" in shown
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    before, after = metrics["before"]["loss"], metrics["after"]["loss"]
    assert after < 0.8 * before

    # In processes that have not trained.
    of_delta = loss_of(text_of(adapeft("evaluate", config, *same)))
    assert of_delta == pytest.approx(after, abs=1e-4)

    arguments = ("merge", tmp_path / "run" / "delta.safetensors", "--model", model_folder(), "--out", tmp_path / "out")
    refused = adapeft(*arguments)
    assert refused.returncode == 2
    assert "--unquantized" in refused.stderr
    done = adapeft(*arguments, "--unquantized", "--evaluate", tmp_path / "run" / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    scores = json.loads((tmp_path / "out" / "adapeft_merge.json").read_text())["scores"]
    assert scores["delta"]["loss"] == pytest.approx(after, abs=1e-4)
    for metric, both in {name: (scores["delta"][name], scores["merged"][name]) for name in scores["delta"]}.items():
        assert f"{metric} {both[0]:.4f} {both[1]:.4f}" in " ".join(done.stderr.split())
    merged = [f"model.name={tmp_path / 'out'}", "quantization=none", *same]
    of_merged = loss_of(text_of(adapeft("evaluate", config, "--base", *merged)))
    assert of_merged == pytest.approx(scores["merged"]["loss"], abs=1e-4)
    print(f"{case}: loss {before:.4f} before, {of_delta:.4f} on nf4, {of_merged:.4f} merged into the checkpoint")
    assert of_merged < 0.8 * before

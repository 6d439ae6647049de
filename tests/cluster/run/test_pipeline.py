"""End-to-end runs through the command, a launcher and DeepSpeed: two workers, ZeRO-3, tiny checkpoints.

The classifier runs on Ray, the language model with the local launcher. Imports take most of the time of a launch, so
the tests share a few launches.
"""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from adapeft.deltas.delta import Delta
from adapeft.subset.subset import Subset
from tests.support.checkpoints import (
    adapeft,
    write_bert,
    write_colours,
    write_config,
    write_gpt2,
    write_text,
)

pytestmark = pytest.mark.ray

LOCAL = ("cluster.launcher=local",)
LIBRARY_NOISE = re.compile(r"Warning|WARN|INFO|Traceback|DeepSpeed|\[transformers\]")


def text_of(done) -> str:
    """Return the standard output of a command that must have succeeded with empty standard error."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return config, folder and output of a finished ``adapeft run``."""
    folder = tmp_path_factory.mktemp("classifier")
    model = write_bert(folder / "base")
    config = write_config(folder / "run.yaml", model, *write_colours(folder), head_learning_rate=1e-2)
    return config, folder, text_of(adapeft("run", config))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Return config, folder and output of ``adapeft select`` by element for a causal language model."""
    folder = tmp_path_factory.mktemp("language-model")
    train, evaluation = write_text(folder / "train.txt", 1600), write_text(folder / "validation.txt", 330)
    config = write_config(folder / "run.yaml", write_gpt2(folder / "base"), train, evaluation, task="causal-lm")
    return config, folder, text_of(adapeft("select", config, *LOCAL, "groups=element", "budget=300"))


def test_a_run_writes_its_artifacts(classifier):
    _, folder, _ = classifier
    run = folder / "run"
    written = {path.name for path in run.iterdir()}
    assert {"config.yaml", "groups.parquet", "subset.safetensors", "delta.safetensors", "metrics.json"} <= written
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["learning_rate"] == 5e-2
    logs = {path.name for path in (run / "logs").iterdir()}
    assert {f"{stage}-rank-{rank}.log" for stage in ("measure", "train") for rank in (0, 1)} <= logs
    assert [name for name in logs if name.startswith("events.out.tfevents")]
    assert "ray" not in logs, "Ray Train's bookkeeping serves nobody"

    table = pq.read_table(run / "groups.parquet")
    assert {"parameter", "role", "layer", "depth", "index", "count", "influence", "chosen"} <= set(table.column_names)
    subset = Subset.load(run / "subset.safetensors")
    assert sum(table["chosen"].to_pylist()) == subset.count


def test_metrics_of_a_run(classifier):
    _, folder, _ = classifier
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["metric"] == "accuracy"
    assert metrics["after"]["loss"] < 0.9 * metrics["before"]["loss"]
    subset = Subset.load(folder / "run" / "subset.safetensors")
    assert 0 < metrics["trainable_parameters"] == subset.count <= 0.2 * metrics["total_parameters"]
    choice = metrics["choice"]
    assert 0 < choice["value"] <= choice["bound"]
    assert choice["gap"] == pytest.approx((choice["bound"] - choice["value"]) / choice["bound"], abs=1e-9)
    assert metrics["seconds"].keys() == {"select", "train"}


def test_what_a_run_shows(classifier):
    _, _, output = classifier
    lines = output.splitlines()
    order = ["model", "matched", "trainable", "data", "workers", "output", "measure:", "influence", "train:", "files"]
    positions = [next(i for i, line in enumerate(lines) if line.startswith(name)) for name in order]
    assert positions == sorted(positions)
    assert re.search(r"^trained .*\(\d+\.\d+%\)", output, re.MULTILINE)
    assert re.search(r"^accuracy +0\.\d+ → [01]\.\d+", output, re.MULTILINE)
    assert re.search(r"^delta .* of the model's", output, re.MULTILINE)
    # Only paths may be longer than the terminal is wide.
    assert not [line for line in lines if len(line) > 80 and "/" not in line]
    assert not [line for line in lines if LIBRARY_NOISE.search(line) and "/" not in line]


def test_running_again_measures_and_trains_nothing(command, classifier):
    config, folder, _ = classifier
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    output = text_of(command("run", config))
    assert "already chosen" in output
    assert "already done" in output
    assert "starting" not in output
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_budget_measures_nothing(command, classifier):
    config, folder, _ = classifier
    again = ["select", config, f"select.statistics={folder / 'run'}"]
    output = text_of(command(*again, "budget=50", f"output={folder / 'smaller'}"))
    assert "starting" not in output
    smaller, larger = (Subset.load(folder / name / "subset.safetensors") for name in ("smaller", "run"))
    assert 0 < smaller.count < larger.count
    # For the same budget, saved statistics give the same subset as the measurement itself.
    text_of(command(*again, f"output={folder / 'same'}"))
    same = Subset.load(folder / "same" / "subset.safetensors")
    assert same.parts == larger.parts


def test_statistics_of_another_question_are_refused(command, classifier):
    config, folder, _ = classifier
    done = command(
        "select", config, f"select.statistics={folder / 'run'}", "seed=1", f"output={folder / 'other-question'}"
    )
    assert done.returncode == 2
    assert "seed: 1 here, 0 there" in done.stderr


def test_the_folder_of_another_run_is_refused(command, classifier):
    config, _, _ = classifier
    done = command("run", config, "budget=5%", "train.epochs=1")
    assert done.returncode == 2
    assert "holds another run:\n  select.budget: 5% here, 20% there\n  train.epochs: 1.0 here, 6.0 there" in done.stderr
    assert "Give another folder: output=" in done.stderr


@pytest.mark.slow
def test_evaluating_the_delta_gives_the_runs_score(classifier):
    config, folder, _ = classifier
    output = text_of(adapeft("evaluate", config, "cluster.workers=1", "zero_stage=0"))
    expected = json.loads((folder / "run" / "metrics.json").read_text())["after"]
    assert f"accuracy    {expected['accuracy']:.4f}\n" in output


@pytest.mark.slow
def test_evaluating_the_base_gives_the_score_before(classifier):
    config, folder, _ = classifier
    output = text_of(adapeft("evaluate", config, "--base"))
    expected = json.loads((folder / "run" / "metrics.json").read_text())["before"]
    assert f"accuracy    {expected['accuracy']:.4f}\n" in output


def test_a_merged_run_is_a_plain_checkpoint(command, classifier):
    _, folder, _ = classifier
    delta_path = folder / "run" / "delta.safetensors"
    text_of(command("merge", delta_path, "--model", folder / "base", "--out", folder / "merged"))
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        inputs = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=16)
        inputs = {name: torch.tensor(value) for name, value in inputs.items()}
        predicted = merged(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.argmax(1)
    right = [merged.config.id2label[int(p)] == row["label"] for p, row in zip(predicted, rows, strict=True)]
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert sum(right) / len(right) == pytest.approx(metrics["after"]["accuracy"], abs=1e-6)

    # The result is exactly p-sparse, despite weight decay.
    base, after = load_file(folder / "base" / "model.safetensors"), load_file(folder / "merged" / "model.safetensors")
    changed = sum(int((after[f"bert.{name}"] != value).sum()) for name, value in base.items())
    assert 0 < changed <= metrics["trainable_parameters"] == Delta.load(delta_path).count


@pytest.mark.parametrize(
    ("name", "said"),
    [("run", "accuracy"), ("run/subset.safetensors", "influence"), ("run/delta.safetensors", "fingerprint")],
)
def test_show(command, classifier, name, said):
    _, folder, _ = classifier
    assert said in text_of(command("show", folder / name))


def test_a_language_model_by_element(command, language_model):
    config, folder, output = language_model
    assert "in blocks of 16 tokens" in output
    chosen = Subset.load(folder / "run" / "subset.safetensors")
    assert chosen.count + chosen.choice.unspent == 300
    assert chosen.count > 0
    assert ("unspent" in output.split()) == (chosen.count < 300)
    assert 0 < chosen.choice.lora_from <= 300
    assert "LoRA (method: lora) has lower losses" in " ".join(output.split())
    # At this reach a part of the budget is left, which fill draws.
    again = ("groups=element", "budget=300", f"select.statistics={folder / 'run'}", "reach=100")
    left = text_of(command("select", config, *again, f"output={folder / 'left'}", "fill=false"))
    filled = text_of(command("select", config, *again, f"output={folder / 'filled'}"))
    part, whole = (Subset.load(folder / name / "subset.safetensors") for name in ("left", "filled"))
    assert part.count < 300 == whole.count
    assert (whole.choice.num_chosen, whole.choice.num_drawn) == (part.count, 300 - part.count)
    assert ("drawn" in left.split(), "drawn" in filled.split()) == (False, True)
    fewer, alone = folder / "fewer", ("groups=element", "joint=false")
    arguments = (*alone, "budget=100", f"select.statistics={folder / 'run'}", f"output={fewer}")
    assert "starting" not in text_of(command("select", config, *arguments))
    assert Subset.load(fewer / "subset.safetensors").count == 100
    # The run `fewer` has no statistics itself; it refers to those of the first run.
    arguments = (*alone, "budget=50", f"select.statistics={fewer}", f"output={folder / 'fewest'}")
    assert "starting" not in text_of(command("select", config, *arguments))
    assert Subset.load(folder / "fewest" / "subset.safetensors").count == 50


def test_training_a_saved_subset(command, language_model):
    config, folder, _ = language_model
    trained = folder / "trained"
    subset = folder / "run" / "subset.safetensors"
    count = Subset.load(subset).count
    overrides = (f"train.subset={subset}", f"output={trained}", "groups=element", "budget=300")
    text_of(adapeft("train", config, *LOCAL, *overrides))
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["metric"] == "loss"
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
    assert metrics["changed_parameters"] == count
    text_of(command("merge", trained / "delta.safetensors", "--model", folder / "base", "--out", folder / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    pairs = zip(merged.parameters(), base.parameters(), strict=True)
    assert 0 < sum(int((after != before).sum()) for after, before in pairs) <= count

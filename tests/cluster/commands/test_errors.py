"""Invalid input exits with status 2 and a message with field, value and remedy, before anything runs."""

from __future__ import annotations

import json

import pytest
import ray
from transformers import PreTrainedModel

from tests.support.checkpoints import (
    write_bert,
    write_classifier,
    write_colours,
    write_config,
    write_gpt2,
    write_lines,
    write_text,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with checkpoints and data of a classifier and a language model."""
    folder = tmp_path_factory.mktemp("files")
    write_bert(folder / "base")
    write_classifier(folder / "two-classes", num_labels=2)
    write_gpt2(folder / "gpt2")
    write_colours(folder)
    write_text(folder / "long.txt", 400)
    write_text(folder / "blocks-of-two.txt", 40)
    write_text(folder / "short.txt", 10)
    (folder / "empty.jsonl").write_text("")
    write_lines(folder / "two.jsonl", [{"text": "the sky", "label": "blue"}, {"text": "a rose", "label": "red"}])
    write_lines(folder / "other-classes.jsonl", [{"text": "the sun", "label": "yellow"}] * 3)
    return folder


@pytest.fixture
def refused(files, tmp_path, command, monkeypatch):
    """Run a command that must fail with an input error before it loads weights or starts Ray; return the message."""

    def must_not_be_called(*_, **__):
        raise AssertionError("called before the config was judged")

    monkeypatch.setattr(ray, "init", must_not_be_called)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", must_not_be_called)
    monkeypatch.chdir(files)

    def run(*overrides: str, name: str = "run", task: str = "sequence-classification") -> str:
        sources = ("train.jsonl", "validation.jsonl") if task != "causal-lm" else ("long.txt", "long.txt")
        model = files / ("gpt2" if task == "causal-lm" else "base")
        config = write_config(tmp_path / "run.yaml", model, *(files / source for source in sources), task=task)
        done = command(name, config, *overrides)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error "), done.stderr
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.bugdet=1%", "select.bugdet: unknown key. Did you mean 'select.budget'?"),
        ("select.budget=0", "select.budget = 0: must be above 0; write a fraction such as 0.5%"),
        ("select.budget=101%", "select.budget = 101%: is more than all parameters; write at most 100%"),
        ("budget=1M", "select.budget = 1000000 is 1,000,000 parameters, more than the 5,168 candidates"),
        ("exclude=*qurey*", "select.exclude: the pattern '*qurey*' matches no parameter. Did you mean 'query'?"),
        ("include=querry", "select.include: the pattern 'querry' matches no parameter. Did you mean 'query'?"),
        ("data.train=tran.jsonl", "tran.jsonl: no such file. Did you mean"),
        ("data.label=colour", "data.label = 'colour': data.train has no such column. It has 'text', 'label'."),
        ("data.text=txt", "data.text = 'txt': data.train has no such column. Did you mean 'text'?"),
        ("model.name=two-classes", "'green', 'red', 'blue', but the head of model.name has 'blue', 'green'. Write the"),
        ("data.evaluation=other-classes.jsonl", "data.evaluation has labels that data.train does not: 'yellow'"),
        ("data.train=empty.jsonl", "empty.jsonl: is empty. Name a file with rows."),
        ("cluster.zero_stage=4", "cluster.zero_stage = 4: should be less than or equal to 3"),
        ("cluster.workers=0", "cluster.workers = 0: should be greater than 0"),
        ("cluster.offload=disk", "cluster.offload = disk: should be 'none', 'cpu' or 'nvme'"),
        ("cluster.offload=nvme", "offload = nvme: needs offload_folder, a folder on a fast local drive"),
        ("cluster.offload_folder=/fast", "offload_folder = /fast: is used only with offload = nvme, but it is none"),
        ("cluster.min_workers=3", "min_workers = 3: is more than workers = 2; lower it"),
        ("data.max_length=64", "data.max_length = 64: the model has 32 positions. Lower it to that or less."),
        ("train.subset=none.safetensors", "none.safetensors: no such file"),
        ("select.statistics=nowhere", "nowhere"),
    ],
)
def test_refusals(refused, override, message):
    assert message in refused(override)


def test_a_budget_below_the_cheapest_group(refused):
    message = refused("budget=3", "groups=row")
    assert (
        "select.budget = 3 is 3 parameters, less than the cheapest row group (16). Raise it, or set a finer" in message
    )


def test_offload_without_the_stage_that_divides_weights(refused):
    message = refused("cluster.offload=cpu", "cluster.zero_stage=2")
    assert "offload = cpu: needs zero_stage = 3, which divides weights, but it is 2; set zero_stage: 3, or" in message


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("fast", "offload_folder = fast: should be an absolute path"),
        ("/nowhere/fast", "cluster.offload_folder = /nowhere/fast: cannot be used (No such file or directory)"),
    ],
)
def test_a_missing_offload_folder(refused, folder, message):
    assert message in refused("cluster.offload=nvme", f"cluster.offload_folder={folder}")


@pytest.mark.parametrize("name", ["./bse", "/nowhere/bse", f"/{'a' * 300}/bse"])
def test_a_missing_model(refused, files, name):
    """Fails immediately; without a network, a request to the hub takes half a minute. A file is not a model."""
    (files / "bsee").touch()
    message = refused(f"model.name={name}")
    assert f"model.name = {name}: no such folder." in message
    assert ("Did you mean 'base'?" in message) == (name == "./bse")


def test_fewer_examples_than_ranks(refused, files):
    message = refused("data.train=two.jsonl", "data.evaluation=two.jsonl", "cluster.workers=3")
    assert "select.calibration = 160 with data.train of 2 examples leaves 2 example(s) to measure on" in message
    assert "fewer than the 3 that 3 rank(s) need. Raise select.calibration, give more training data or" in message
    assert "leaves 2 example(s) to measure on" in refused("calibration=2", "cluster.workers=3")


def test_fewer_blocks_than_ranks(refused):
    """The number of examples of a language model is known only after tokenizing."""
    message = refused("data.train=blocks-of-two.txt", "cluster.workers=3", task="causal-lm")
    assert "data.train of 2 examples leaves 2 example(s) to measure on, fewer than the 3" in message
    message = refused("data.train=short.txt", task="causal-lm")
    assert "data.train: data.max_length = 16: the texts have only 10 tokens, less than one block" in message
    message = refused("data.evaluation=short.txt", task="causal-lm")
    assert "data.evaluation: data.max_length = 16: the texts have only 10 tokens" in message


def test_a_folder_of_somebody_elses(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("")
    message = refused(f"output={tmp_path / 'thesis'}")
    assert "thesis holds files that do not belong to a run (chapter-1.tex …). Give a new or empty folder." in message


def test_training_without_a_subset(refused):
    assert "has no subset.safetensors. Run `adapeft select` first, or give a subset: train.subset=PATH" in refused(
        name="train"
    )


def test_evaluating_without_a_delta(refused):
    assert "no such delta. Run `adapeft train` first, or give --delta PATH or --base." in refused(name="evaluate")


def test_merging_into_a_folder_in_use(command, files):
    (files / "not-a-delta.safetensors").write_text(json.dumps({}))
    done = command("merge", files / "not-a-delta.safetensors", "--model", files / "base", "--out", files / "merged")
    assert done.returncode == 2
    assert "not-a-delta.safetensors" in done.stderr

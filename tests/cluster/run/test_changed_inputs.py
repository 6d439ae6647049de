"""The command resumes a run that died only on unchanged inputs; tested up to the start of workers."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapeft.config.load import load_config
from adapeft.measure.partial import PartialSums
from adapeft.ranks import OneRank
from cluster.inspection.inspect import inspect
from cluster.output.contents import contents_of
from cluster.output.folder import RunFolder
from cluster.ranks.measure import sums_key
from tests.support.checkpoints import write_bert, write_colours, write_config


class WorkersNeededError(Exception):
    """Raised where the command would start workers, after all checks."""


@pytest.fixture
def died(tmp_path, monkeypatch):
    """Return the config of a run that died during training."""

    def start(*_, **__):
        raise WorkersNeededError

    monkeypatch.setattr("cluster.launch.opening.open_launcher", start)
    path = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    claim(path)
    (tmp_path / "run" / "checkpoints" / "step-10").mkdir(parents=True)
    return path


def claim(path):
    config = load_config(path)
    inspection = inspect(config)
    contents = contents_of(config, inspection.description)
    RunFolder.of(config).claim(config, contents).release()
    return config, contents, inspection


def swap_rows(folder):
    path = folder / "train.jsonl"
    first, second, *others = path.read_text().splitlines(keepends=True)
    assert first != second
    path.write_text("".join([second, first, *others]))


def relabel(folder):
    path = folder / "validation.jsonl"
    path.write_text(path.read_text().replace('"red"', '"blue"', 1))


def link_elsewhere(folder):
    path = folder / "train.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    (folder / "elsewhere.jsonl").write_text("".join(rows[:-1]))
    path.unlink()
    path.symlink_to(folder / "elsewhere.jsonl")


def one_weight(folder):
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "embeddings.word_embeddings.weight"
    tensors[name][5, 0] = torch.nextafter(tensors[name][5, 0], torch.tensor(9.0))
    save_file(tensors, path, metadata={"format": "pt"})


def other_tokens(folder):
    path = folder / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["old"], vocabulary["new"] = vocabulary["new"], vocabulary["old"]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (swap_rows, "data.train"),
        (link_elsewhere, "data.train"),
        (relabel, "data.evaluation"),
        (one_weight, "model.name"),
        (other_tokens, "model.name"),
    ],
)
def test_inputs_that_were_edited_after_a_crash_are_refused(command, died, edit, key):
    edit(died.parent)
    done = command("run", died)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert "holds results of inputs that have changed since" in said
    assert f"{key} = {died.parent}" in said
    assert said.count("content ") == 1, "the others are as they were"
    assert (died.parent / "run" / "checkpoints" / "step-10").is_dir()


def test_another_learning_rate_after_a_crash_is_refused(command, died):
    done = command("run", died, "learning_rate=1e-3")
    assert done.returncode == 2
    assert "train.learning_rate: 0.001 here, 0.05 there" in " ".join(done.stderr.split())
    with pytest.raises(WorkersNeededError):
        command("run", died)


def test_what_changes_no_value_is_resumed(command, died):
    """Modification times, links, another format of the same rows, a model card and the number of workers."""
    folder = died.parent
    for path in (folder / "train.jsonl", folder / "base" / "model.safetensors"):
        os.utime(path, (10**9, 10**9))
    rows = list(map(json.loads, (folder / "validation.jsonl").read_text().splitlines()))
    (folder / "elsewhere.jsonl").write_text("\n\n".join(json.dumps({"id": 1, **row}) for row in rows))
    (folder / "validation.jsonl").unlink()
    (folder / "validation.jsonl").symlink_to(folder / "elsewhere.jsonl")
    (folder / "base" / "README.md").write_text("a card")
    with pytest.raises(WorkersNeededError):
        command("run", died, "cluster.workers=1")


def test_a_measurement_that_died_begins_anew_on_edited_data(tmp_path):
    path = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    dropped = []
    for edit in (lambda folder: None, lambda folder: None, relabel, swap_rows, one_weight):
        edit(tmp_path)
        config, contents, inspection = claim(path)
        key = sums_key(config, contents, inspection.groups, inspection.description.num_train, world_size=1)
        sums = PartialSums(tmp_path / "run", key, 1.0, OneRank())
        dropped.append(sums.dropped)
        sums.save("direction", 1, 1, [torch.zeros(2)])
    # Measuring does not use the evaluation data, so its new contents drop nothing.
    assert dropped == [[], [], [], ["content of data.train"], ["content of model.name"]]

"""``adapeft subsets`` in this process, on a store in a folder, without runs or Ray."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from adapeft.config.load import load_config
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.store import STORE_VARIABLE
from adapeft.subset.subset import Subset
from cluster.run.pipeline import select
from cluster.run.session import Session
from cluster.terminal.console import Terminal
from tests.support.checkpoints import write_bert, write_colours, write_config

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
SAID = {"method": "sam", "granularity": "tensor", "budget": 300, "num_total": 5168, "fingerprint": "0123456789abcdef"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_bert(folder / "base"), *write_colours(folder)


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """Return a run folder with config, subset and scores, as ``adapeft run`` writes them."""
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder / "config.yaml", *files)
    Subset({QUERY: Whole((16, 16))}, choice=Choice(**SAID)).save(folder / "subset.safetensors")
    scores = {"metric": "accuracy", "before": {"accuracy": 0.25}, "after": {"accuracy": 0.75, "loss": 1.0}}
    (folder / "metrics.json").write_text(json.dumps(scores))
    return folder


def test_a_run_goes_in_and_out(command, run, files):
    assert "no subsets" in command("subsets", "list").stdout
    done = command("subsets", "add", "colours", run)
    assert done.returncode == 0
    assert "train.subset=colours" in done.stdout

    listed = command("subsets", "list").stdout
    for word in ("colours", "base", "sam by tensor", "256 (4.954%)", "accuracy 0.2500 → 0.7500", "0123456789ab"):
        assert word in listed, listed
    shown = " ".join(command("subsets", "show", "colours").stdout.split())
    for word in (str(files[0]), "sequence-classification on", "budget 300", "sha256", "attention.self.query.weight"):
        assert word in shown, shown
    assert "attention.self.query.weight" in command("show", "colours").stdout

    assert command("subsets", "add", "colours", run).returncode == 2
    assert "'colours' is taken in the store" in command("subsets", "add", "colours", run).stderr
    assert command("subsets", "remove", "colours", "--yes").returncode == 0
    assert "no such subset" in command("subsets", "show", "colours").stderr


def test_it_asks_before_it_removes(command, run, monkeypatch):
    command("subsets", "add", "colours", run)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert command("subsets", "remove", "colours").returncode == 1
    assert "colours" in command("subsets", "list").stdout
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert command("subsets", "remove", "colours").returncode == 0
    assert "no subsets" in command("subsets", "list").stdout


def test_filters_and_other_stores(command, run, tmp_path):
    command("subsets", "add", "colours", run)
    command("subsets", "add", "bare", run / "subset.safetensors", "--store", tmp_path / "other")
    assert "bare" in command("subsets", "list", "--store", tmp_path / "other").stdout
    assert "bare" not in command("subsets", "list").stdout
    assert "colours" in command("subsets", "list", "--method", "sam", "--base", "base").stdout
    assert "no such subsets" in command("subsets", "list", "--method", "adapeft").stdout
    assert "no such subsets" in command("subsets", "list", "--base", "llama").stdout
    assert "colours" in command("subsets", "list", "--task", "train.jsonl").stdout
    assert "colours" in command("subsets", "list", "--task", "classification").stdout
    assert "no such subsets" in command("subsets", "list", "--task", "causal-lm").stdout


def test_listing_does_not_wait_for_torch():
    code = (
        "import sys, adapeft.subset.store, cluster.terminal.console; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_broken_is_named(command, run, tmp_path):
    command("subsets", "add", "colours", run)
    (tmp_path / "store" / "cut.json").write_text('{"name": "cu')
    (tmp_path / "store" / f"begun@{'0' * 32}.safetensors").write_bytes(b"half")
    listed = command("subsets", "list")
    assert listed.returncode == 0
    assert "'cut' is damaged" in listed.stdout
    assert "begun" not in listed.stdout
    assert "'begun' is half written" in command("subsets", "list", "--all").stdout


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "'nowhere': no such subset in the store"),
        ("nowhere.safetensors", "nowhere.safetensors: no such file"),
        (".", "no run with a subset"),
        ("run/metrics.json", "is not a subset, or it is truncated"),
    ],
)
def test_what_cannot_be_added(command, run, tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    done = command("subsets", "add", "colours", source)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_run_trains_what_a_name_stands_for(command, run, files, tmp_path):
    command("subsets", "add", "colours", run)
    path = write_config(tmp_path / "other.yaml", *files)
    config = load_config(path, ["train.subset=colours", f"output={tmp_path / 'other'}"])
    with Session(config, Terminal()) as session:
        chosen = select(session)
    assert chosen.parts == {QUERY: Whole((16, 16))}
    kept = Subset.load(tmp_path / "other" / "subset.safetensors").choice.source
    assert kept["subset"] == "colours"
    assert kept["sha256"] == json.loads((tmp_path / "store" / "colours.json").read_text())["sha256"]
    assert load_config(tmp_path / "other" / "config.yaml").train.subset == "colours"


def test_another_architecture_is_refused(command, run, files, tmp_path):
    Subset({"transformer.h.0.weight": Whole((2, 2))}).save(tmp_path / "gpt2.safetensors")
    command("subsets", "add", "gpt2", tmp_path / "gpt2.safetensors")
    path = write_config(tmp_path / "other.yaml", *files)
    done = command("train", path, "train.subset=gpt2", f"output={tmp_path / 'other'}")
    assert done.returncode == 2
    assert "the subset trains 'transformer.h.0.weight', which is not in this model" in done.stderr
    done = command("train", path, "train.subset=gpt3", f"output={tmp_path / 'other'}")
    assert "'gpt3': no such subset in the store" in done.stderr
    assert "Did you mean 'gpt2'" in done.stderr

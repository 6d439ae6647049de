"""Runs whose output is a bucket: one machine finishes a run that another has started."""

from __future__ import annotations

import json

import fsspec
import pytest
from transformers import AutoModelForSequenceClassification

from cluster.output.place import working_folder
from cluster.zero.compiled import extensions_folder
from tests.support.checkpoints import adapeft

pytestmark = pytest.mark.ray

OVERRIDES = ("cluster.workers=1", "zero_stage=1", "calibration=32", "warmup_steps=4", "max_steps=6", "save_steps=2")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Run the command on a simulated machine, with a separate cache; return its standard output."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions_folder()))

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        done = adapeft(*arguments, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_another_machine_goes_on(config, bucket, machine, tmp_path):
    url = f"{bucket}/runs/mine"
    files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    machine("first", "select", config, *OVERRIDES, f"output={url}")
    assert {
        "config.yaml",
        "contents.json",
        "groups.parquet",
        "subset.safetensors",
        "metrics.json",
        "logs",
        "statistics.tar",
    } == {path.rpartition("/")[2] for path in files.ls(url)}

    said = machine("second", "run", config, *OVERRIDES, f"output={url}")
    assert "subset: already chosen" in said
    assert "measure:" not in said
    stored = {path.rpartition("/")[2] for path in files.ls(url)}
    assert {"delta.safetensors", "checkpoints.tar"} <= stored
    metrics = json.loads(files.cat_file(f"{url}/metrics.json"))
    assert metrics["num_steps"] == 6

    said = machine("first", "run", config, *OVERRIDES, f"output={url}")
    assert "training: already done" in said
    assert json.loads((working_folder(url) / "metrics.json").read_text()) == metrics

    # Other commands that take a run or a delta also accept its URL.
    assert "accuracy" in machine("third", "show", url)
    machine("third", "merge", f"{url}/delta.safetensors", "--model", config.parent / "base", "--out", tmp_path / "out")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    again = ("select", config, *OVERRIDES, "budget=3%", f"select.statistics={url}", f"output={bucket}/runs/smaller")
    assert "starting" not in machine("fourth", *again)
    assert files.exists(f"{bucket}/runs/smaller/subset.safetensors")


def test_a_comparison_wants_a_folder(config, command):
    done = command("compare", config, "methods=[random]", "output=s3://bucket/runs")
    assert done.returncode == 2
    assert "output = s3://bucket/runs: `adapeft compare` writes only to a folder" in " ".join(done.stderr.split())


def test_a_bucket_that_is_not_there_is_told_before_anything_is_measured(config, bucket, command, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = command("run", config, "output=s3://mistyped/mine")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert said.startswith("error s3://mistyped/mine: cannot be read (FileNotFoundError")
    assert "starting workers" not in done.stdout

"""Every command exits with status 2 and a single error that names the file when a file is damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from rich.console import Console

from adapeft.config.experiments import Trials
from adapeft.config.keys import measurement_key
from adapeft.config.load import load_config
from adapeft.deltas.delta import Delta
from adapeft.measure.groups import groups_of
from adapeft.measure.storage import save_groups
from adapeft.parts.change import Change
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.store import STORE_VARIABLE, SubsetStore
from adapeft.subset.subset import Subset
from cluster.commands.subsets.table import show_entries, show_entry
from cluster.output.folder import RunFolder
from cluster.output.metrics import load_metrics
from cluster.output.validation import load_validation, save_validation
from cluster.terminal.console import Terminal
from cluster.terminal.validation import show_validation
from tests.support.checkpoints import write_bert, write_colours, write_config
from tests.support.damage import check, damaged_safetensors, damaged_trees, examples

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
SCORES = {"accuracy": 0.5, "loss": 1.0}
METRICS = {
    **{"metric": "accuracy", "before": SCORES, "after": SCORES, "last": SCORES, "history": [{"step": 3, **SCORES}]},
    **{"total_parameters": 5168, "trainable_parameters": 256, "always_trained_parameters": 51, "delta_bytes": 2048},
    **{"peak_memory_bytes": 2**20, "seconds": {"select": 1.5, "train": 2.5}},
    "choice": {
        "value": 1.0,
        "bound": 1.0,
        "gap": 0.0,
        "status": "optimal",
        "num_chosen": 1,
        "num_groups": 9,
        "unspent": 8,
    },
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Return a folder with a finished run, all its artifacts, its base model and its data."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("originals")
    train, validation = write_colours(folder, 12, 8)
    run = folder / "run"
    run.mkdir()
    write_config(run / "config.yaml", write_bert(folder / "base"), train, validation)
    config = load_config(run / "config.yaml")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    groups = groups_of(model, config.select)
    numbers = {name: np.ones(groups.num_groups) for name in ("slope", "curvature")}
    save_groups(run, groups, numbers, measurement_key(config))
    said = {"method": "adapeft", "budget": 600, "reach": 0.1, "fingerprint": groups.fingerprint}
    Subset({QUERY: Rows((16, 16), torch.tensor([1, 3]))}, choice=Choice(**said)).save(run / "subset.safetensors")
    change = Change(Rows((16, 16), torch.tensor([1, 3])), torch.ones(2, 16))
    described = {"model": {"name": "base", "task": "sequence-classification", "labels": {"num_labels": 3}}}
    Delta({QUERY: change}, {}, groups.fingerprint, described).save(run / "delta.safetensors")
    (run / "metrics.json").write_text(json.dumps(METRICS))
    return folder


@pytest.fixture
def folder(originals, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(originals, tmp_path / "files")
    config = tmp_path / "files" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(originals), str(tmp_path / "files")))
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def test_undamaged_a_run_is_shown(command, folder):
    done = command("show", "run")
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert command("show", "run/delta.safetensors").returncode == 0


DELTA, SUBSET = "run/delta.safetensors", "run/subset.safetensors"


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("run/config.yaml", "config run/config.yaml"),
        ("run/config.yaml", "estimate run/config.yaml"),
        ("run/config.yaml", "run run/config.yaml"),
        ("run/config.yaml", "show run"),
        ("run/config.yaml", "subsets add mine run"),
        ("run/config.yaml", "horizons run"),
        ("run/groups.parquet", "show run"),
        ("run/groups.parquet", "transfer --from run --to base output=new"),
        ("run/metrics.json", "show run"),
        ("run/metrics.json", "subsets add mine run"),
        (SUBSET, "show run"),
        (SUBSET, f"show {SUBSET}"),
        (SUBSET, f"subsets add mine {SUBSET}"),
        (SUBSET, "transfer --from run --to base output=new"),
        (SUBSET, f"run run/config.yaml output=new train.subset={SUBSET}"),
        (DELTA, f"show {DELTA}"),
        (DELTA, f"merge {DELTA} --model base --out new"),
        (DELTA, f"export {DELTA} --to peft --model base --out new"),
        (DELTA, f"export {DELTA} --to unfrozen-parameters --out new"),
        (DELTA, f"delta scale {DELTA} --factor 2 --out new"),
        ("base/config.json", f"merge {DELTA} --model base --out new"),
        ("base/model.safetensors", f"merge {DELTA} --model base --out new"),
        ("base/config.json", "import run --model base --out new"),
        ("base/config.json", "estimate run/config.yaml"),
        ("base/tokenizer.json", "estimate run/config.yaml"),
        ("train.jsonl", "estimate run/config.yaml"),
        ("validation.jsonl", "run run/config.yaml"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_ends_a_command(command, folder, file, arguments, damage):
    path = folder / file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" and "yaml" not in file else b"\x80{[\xff" * 9)
    done = command(*arguments.split())
    assert done.returncode == 2, done
    assert done.stderr.startswith("error "), done.stderr
    assert "Traceback" not in done.stderr
    assert path.name in done.stderr or path.parent.name in done.stderr, done.stderr
    assert not (folder / "new").exists()


def test_damaged_metrics(folder):
    path = folder / "run" / "metrics.json"
    config, terminal = load_config(folder / "run" / "config.yaml"), Terminal(Console(file=StringIO()))

    @examples(150)
    @given(damaged_trees(METRICS))
    def run(tree: Any) -> None:
        path.write_text(json.dumps(tree))
        found = check(lambda: load_metrics(path), path)
        if isinstance(found, dict) and "after" in found:
            terminal.show_summary(config, found, RunFolder(path.parent))

    run()


def test_damaged_validations_are_shown(tmp_path):
    path, terminal, trials = tmp_path / "run" / "validation.json", Terminal(Console(file=StringIO())), Trials()
    path.parent.mkdir()
    found = {"influence (adam)": {"all": 0.9, "single tensors": None}, "count": {"all": 0.5, "single tensors": 0.1}}
    constants = {"planned_constant": 0.3, "fitted_constant": 0.75, "overshooting": 0.25}
    constants |= {"learning_rate": 3e-4, "steps": 20, "at_fitted_reach": {"influence (adam)": 0.95, "count": None}}
    setting = {**constants, "correlations": found}
    save_validation(path, {"settings": [setting]}, trials)
    show_validation(load_validation(path, trials), terminal)
    assert "0.95" in terminal.console.file.getvalue()

    @examples(150)
    @given(damaged_trees(json.loads(path.read_text())))
    def run(tree: Any) -> None:
        path.write_text(json.dumps(tree))
        content = check(lambda: load_validation(path, trials), path)
        if isinstance(content, dict):
            show_validation(content, terminal)

    run()


def test_damaged_subsets_are_shown(folder):
    path, terminal = folder / SUBSET, Terminal(Console(file=StringIO()))
    said = {
        **METRICS["choice"],
        **Subset.load(path).choice.recorded(),
        "memory_per_device": 2**30,
        "memory_bytes": 2**29,
    }
    Subset.load(path).described(**said).save(path)

    @examples(150)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: Subset.load(path), path)
        if isinstance(found, Subset):
            terminal.show_choice(found)

    run()


def test_damaged_deltas_are_shown(folder):
    path, terminal = folder / DELTA, Terminal(Console(file=StringIO()))
    said = {"scores": SCORES, "method": "adapeft", "sources": [{"name": "a", "weight": 0.5}]}
    found = Delta.load(path)
    replace(found, description={**found.description, **said}).save(path)

    @examples(150)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: Delta.load(path), path)
        if isinstance(found, Delta):
            terminal.show_delta(found, path)

    run()


def test_damaged_entries_are_shown(folder):
    store, terminal = SubsetStore(str(folder / "store")), Terminal(Console(file=StringIO()))
    metrics = {"metric": "accuracy", "before": SCORES, "after": SCORES}
    config = (folder / "run" / "config.yaml").read_text()
    store.add("mine", folder / SUBSET, Subset.load(folder / SUBSET).summary(config, metrics))
    path = folder / "store" / "mine.json"

    @examples(150)
    @given(damaged_trees(json.loads(path.read_text())))
    def run(tree: Any) -> None:
        path.write_text(json.dumps(tree))
        for entry in store.entries()[0]:
            show_entries([entry], terminal)
            show_entry(entry, terminal)

    run()


def test_names_are_no_markup(command, folder):
    """Names in files are printed as text, without terminal markup or escape sequences."""
    subset = Subset({"[/bold]": Whole((4,))}, choice=Choice(method="[red]"))
    subset.save(folder / "odd.safetensors")
    assert "[/bold]" in command("show", "odd.safetensors").stdout
    Subset({"a\x1b[2J": Whole((4,))}).save(folder / "odd.safetensors")
    done = command("show", "odd.safetensors")
    assert done.returncode == 2
    assert "\x1b[2J" not in done.stderr

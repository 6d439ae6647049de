"""The command without runs: help, configs, methods and errors."""

from __future__ import annotations

import json
import subprocess
import sys

import yaml

from adapeft.methods.registry import METHODS


def test_without_arguments_it_lists_the_commands(command):
    _, output, errors = command()
    for name in ("run", "select", "train", "evaluate", "merge", "export", "import", "show", "config"):
        assert name in output + errors


def test_help_tells_the_exit_statuses(command):
    _, output, _ = command("--help")
    said = " ".join(output.split())
    assert "Exit status: 0 done; 1 a worker, machine or job failed" in said
    assert "2 the input is invalid" in said
    assert "130 interrupted" in said


def test_config_prints_every_key(command):
    status, output, _ = command("config")
    assert status == 0
    tree = yaml.safe_load(output)
    assert tree["model"]["name"] == "???"
    assert tree["select"]["budget"] == "0.5%"


def test_config_prints_a_schema(command):
    status, output, _ = command("config", "--schema")
    assert status == 0
    assert json.loads(output)["$defs"]["Cluster"]["properties"]["zero_stage"]["maximum"] == 3


def test_config_prints_one_of_both(command):
    status, _, errors = command("config", "run.yaml", "--schema")
    assert status == 2
    assert "--schema: prints the schema of every config, and reads no run.yaml" in " ".join(errors.split())


def test_config_checks_a_file(command, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{model: {name: x, task: causal-lm}, data: {train: a.txt, evaluation: b.txt}, output: out}")
    status, output, _ = command("config", path, "budget=2%")
    assert status == 0
    assert yaml.safe_load(output)["select"]["budget"] == "2%"
    status, _, errors = command("config", path, "bugdet=2%")
    assert status == 2
    assert "bugdet: unknown key. Did you mean 'select.budget'?" in errors


def test_evaluate_refuses_a_delta_that_it_would_not_apply(command, tmp_path):
    (path := tmp_path / "run.yaml").touch()
    status, output, errors = command("evaluate", path, "--base", "--delta", tmp_path / "delta.safetensors")
    assert (status, output) == (2, "")
    assert "--base: evaluates without a delta" in errors


def test_methods_are_listed_with_family_cost_and_source(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    status, output, _ = command("methods")
    assert status == 0
    lines = {line.split()[0]: line for line in output.splitlines()}
    for name, method in METHODS.items():
        for said in (method.family, method.summary, method.cost, method.source):
            assert said in lines[name], name
    families = {"none", "random", "rule", "projection", "first-order", "second-order"}
    assert {method.family for method in METHODS.values()} == families


def test_help_does_not_wait_for_torch():
    code = "import sys, cluster.cli; print(sorted({'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = code.replace("cluster.cli", "cluster.terminal.console")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "the terminal has to be there while these are imported"


def test_show_of_something_else(command, tmp_path):
    status, _, errors = command("show", tmp_path)
    assert status == 2
    assert "not the folder of a run (no config.yaml)" in errors
    (tmp_path / "foreign.safetensors").write_bytes(b"not a file of ours")
    status, _, errors = command("show", tmp_path / "foreign.safetensors")
    assert status == 2
    assert "neither a run's folder, nor a subset, nor a delta" in errors

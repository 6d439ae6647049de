"""``adapeft doctor``: versions of packages, and whether each feature works on this machine."""

from __future__ import annotations

import socket
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from adapeft.errors import AdapeftError
from cluster.commands.doctor import features as features_of
from cluster.commands.doctor import packages as packages_of
from cluster.commands.doctor.features import features
from cluster.zero import compiled

LIBRARY, COMMANDS, RAY = "library: select, attach, delta", "commands: run, compare, …", "Ray: several machines, submit"


@pytest.fixture
def packages(monkeypatch):
    """Return a dict of package → simulated version, or None for a missing package; other packages are real."""
    given: dict[str, str | None] = {}

    def seeming(package: str) -> str:
        found = given.get(package, "") or (None if package in given else version(package))
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(packages_of, "version", seeming)
    return given


def problems() -> dict[str, str | None]:
    return {feature.name: feature.problem for feature in features()}


def test_shows_versions_and_that_everything_required_is_there(command, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = command("doctor")
    assert said.returncode == 0, said.stdout
    assert f"torch {torch.__version__}" in said.stdout.replace("\n", " ")
    assert f"deepspeed {version('deepspeed')}" in " ".join(said.stdout.split())
    for name in (LIBRARY, COMMANDS):
        assert any(line.startswith("ready") and name in line for line in said.stdout.splitlines())


def test_a_missing_extra_is_named_with_its_remedy(packages):
    packages["deepspeed"] = packages["s3fs"] = packages["bitsandbytes"] = None
    found = problems()
    assert found[COMMANDS] == f"deepspeed{_declared('deepspeed')} is missing: pip install 'adapeft[cluster]'"
    assert "s3fs" in found["outputs at s3:// URLs"]
    lacking = f"bitsandbytes{_declared('bitsandbytes')} is missing"
    assert found["bases of 8 and 4 bits"] == f"{lacking}: pip install 'adapeft[quantization]'"
    assert found[LIBRARY] is None


def test_a_version_that_is_too_old_is_named(packages):
    packages["peft"] = packages["bitsandbytes"] = "0.1"
    found = problems()
    assert found[LIBRARY] == f"peft{_declared('peft')} (installed: 0.1) is missing: pip install adapeft"
    assert f"bitsandbytes{_declared('bitsandbytes')} (installed: 0.1)" in found["bases of 8 and 4 bits"]


def test_a_required_feature_that_is_missing_is_a_failure(packages, command):
    packages["ray"] = None
    said = command("doctor")
    assert said.returncode == 1
    assert any(line.startswith("missing") and COMMANDS in line for line in said.stdout.splitlines())


def test_no_compiler(monkeypatch):
    def refuse():
        raise AdapeftError("DeepSpeed cannot compile it: no compiler")

    monkeypatch.setattr(compiled, "load_compiled", refuse)
    assert problems()[COMMANDS] == "DeepSpeed cannot compile it: no compiler"


def test_no_cluster_answers(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"RAY_ADDRESS = {address}: no cluster answers at this address" in (problems()[RAY] or "")


def _declared(package: str) -> str:
    lines = features_of.requires("adapeft") or []
    return next(line for line in lines if line.startswith(package)).partition(";")[0].removeprefix(package).strip()

"""Packages of other distributions that shadow ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import adapeft
from adapeft.errors import AdapeftError
from adapeft.installation import check_not_shadowed

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["cluster", "solver"])
def foreign(request, tmp_path):
    (tmp_path / request.param).mkdir()
    (tmp_path / request.param / "__init__.py").write_text("")
    return request.param


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_command_names_the_package_that_hides_ours(foreign, tmp_path):
    ended = _run(tmp_path, "-m", "adapeft", "methods")
    assert ended.returncode == 2
    message = (
        f"error the package '{foreign}' of adapeft is shadowed by another package of that name, {tmp_path / foreign}. "
    )
    assert ended.stderr.startswith(message)


def test_the_library_names_the_package_that_hides_ours(tmp_path):
    (tmp_path / "solver.py").write_text("")
    ended = _run(tmp_path, "-c", "import adapeft; adapeft.select")
    assert f"AdapeftError: the package 'solver' of adapeft is shadowed by another package of that name, {tmp_path}" in (
        ended.stderr
    )


def test_the_command_runs_as_a_module(tmp_path):
    ended = _run(tmp_path, "-m", "adapeft", "--help")
    assert ended.returncode == 0, ended.stderr
    assert "methods" in ended.stdout


def test_a_missing_package_is_named():
    with pytest.raises(AdapeftError, match="the package 'solverr' of adapeft is missing"):
        check_not_shadowed("solverr")


def test_ours_are_found():
    for package in ("adapeft", "cluster", "solver"):
        check_not_shadowed(package)
    assert Path(adapeft.__file__).parent == ROOT / "adapeft"

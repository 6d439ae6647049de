"""DeepSpeed's compiled operation: the lock of a killed process, and machines that cannot compile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from adapeft.errors import AdapeftError
from cluster.zero import compiled
from tests.support.ranks import ROOT, run_on_ranks

pytestmark = pytest.mark.ranks

LOAD = (
    "import os; os.environ['DS_ACCELERATOR'] = 'cpu'; from cluster.zero.compiled import load_compiled; load_compiled()"
)


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """A separate folder with a copy of the compiled operation and a stale lock."""
    subprocess.run([sys.executable, "-c", f"import cluster.zero.engine; {LOAD}"], cwd=ROOT, check=True, timeout=900)
    ready = compiled.extensions_folder() / "deepspeed_shm_comm"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    shutil.copytree(ready, folder, dirs_exist_ok=True)
    (folder / "lock").touch()
    return folder


@pytest.mark.slow
def test_a_killed_process_does_not_block_others(extensions):
    run_on_ranks(2, "tests.on_ranks.join")
    assert not (extensions / "lock").exists()


def test_environments_do_not_replace_each_others(tmp_path, monkeypatch):
    """torch's own folder is one for all of them: each would compile what the other has compiled."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "build_shm_op", lambda: None)
    used = []
    for environment in ("/one", "/other", "/one"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(sys, "prefix", environment)
        compiled.load_compiled()
        used.append(Path(_get_build_directory("deepspeed_shm_comm", False)))
    assert used[0] == used[2] != used[1]
    assert all(folder.is_relative_to(tmp_path) for folder in used)


def test_another_programs_compilation_is_waited_for(tmp_path, monkeypatch):
    """Otherwise one of the two would fail when it removes the lock that the other has removed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    guard = folder / "lock"
    guard.touch()
    os.utime(guard, (0, 0))
    there = []
    monkeypatch.setattr(compiled, "build_shm_op", lambda: there.append(compiler.poll() is None))
    with subprocess.Popen(["sleep", "2"], cwd=folder) as compiler:
        compiled.load_compiled()
    assert there == [False]
    assert not guard.exists()


NO_HEADERS = "Error building extension: [1/3] c++ …\na.h:13:10: fatal error: Python.h: No such file\n   13 | #include"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (RuntimeError(NO_HEADERS), r"Python\.h: No such file"),
        (FileNotFoundError(2, "No such file or directory", "c++"), r"c\+\+"),
        (subprocess.CalledProcessError(1, ["which", "c++"]), "which"),
    ],
)
def test_a_machine_that_cannot_compile(raised, said, tmp_path, monkeypatch):
    def fail():
        raise raised

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "build_shm_op", fail)
    with pytest.raises(AdapeftError, match=rf"{said}.*apt-get install g\+\+ python3-dev"):
        compiled.load_compiled()

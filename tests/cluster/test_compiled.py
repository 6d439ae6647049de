"""A lock that a killed process has left in torch's folder of extensions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.cluster.ranks import ROOT, torchrun

LOAD = "import os; os.environ['DS_ACCELERATOR'] = 'cpu'; from cluster.compiled import load_compiled; load_compiled()"


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """A copy of what is compiled already, in a place of its own, with a lock of nobody's."""
    subprocess.run([sys.executable, "-c", f"import cluster.engine; {LOAD}"], cwd=ROOT, check=True, timeout=300)
    compiled = Path(_get_build_directory("deepspeed_shm_comm", False))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    shutil.copytree(compiled, folder, dirs_exist_ok=True)
    (folder / "lock").touch()
    return folder


@pytest.mark.slow
def test_a_dead_process_holds_up_nobody(extensions):
    torchrun(2, "tests.cluster.rank_join")
    assert not (extensions / "lock").exists()

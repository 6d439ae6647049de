"""Starts test modules on several ranks, as a user would with torchrun, and ends them there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def torchrun(world_size: int, module: str, *arguments: object) -> None:
    """Runs ``python -m module`` on ``world_size`` gloo ranks and shows its output when it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-20000:]


def with_slow(fast: Sequence[tuple], every: Sequence[tuple]) -> list:
    """Every run as the parameter of a test; those that are not ``fast`` are marked slow."""
    return [
        pytest.param(run, id="-".join(map(str, run)), marks=[] if run in fast else pytest.mark.slow) for run in every
    ]


def needed(request: pytest.FixtureRequest) -> str:
    """Which runs the tests of this module need in this session, for the rank's script: ``fast`` or ``every``."""
    selected = [item for item in request.session.items if item.path == request.path]
    return "every" if any(item.get_closest_marker("slow") for item in selected) else "fast"


def leave() -> NoReturn:
    """Ends this rank without the interpreter's own clean-up, which gloo's threads abort now and then.

    DeepSpeed holds on to a process group and so keeps its threads running after all groups were destroyed.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

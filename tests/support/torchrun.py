"""Running of test modules on several ranks with torchrun."""

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
    """Run ``python -m module`` on ``world_size`` gloo ranks and show the output if it fails."""
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
    """Return all runs as test parameters; those not in ``fast`` are marked slow."""
    return [
        pytest.param(run, id="-".join(map(str, run)), marks=[] if run in fast else pytest.mark.slow) for run in every
    ]


def needed(request: pytest.FixtureRequest) -> str:
    """Return ``fast`` or ``every``: the runs that the selected tests of this module need, for the script on ranks."""
    selected = [item for item in request.session.items if item.path == request.path]
    return "every" if any(item.get_closest_marker("slow") for item in selected) else "fast"


def leave() -> NoReturn:
    """Exit this rank without the interpreter's cleanup, which gloo's threads sometimes abort.

    DeepSpeed keeps a reference to a process group, whose threads continue to run after all groups were destroyed.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

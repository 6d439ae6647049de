"""Running of test modules on several ranks, as torchrun does, but in forks of a process that has the libraries."""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pytest
import torch.distributed as dist

from cluster.launch.local import end_with_parent
from tests.support.processes import FORKS

ROOT = Path(__file__).parents[2]
_SECONDS = 1500


def run_on_ranks(world_size: int, module: str, *arguments: object) -> None:
    """Run ``python -m module`` on ``world_size`` gloo ranks and show the output if it fails."""
    # This process hosts the store, as torchrun's does, so no other can take the port in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    command = [module, *map(str, arguments)]
    with TemporaryDirectory() as logs:
        outputs = [Path(logs, str(rank)) for rank in range(world_size)]
        processes = []
        for rank, output in enumerate(outputs):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(FORKS.Process(target=_run, args=(command, own, output)))
        for process in processes:
            process.start()
        running, deadline = {process.sentinel: process for process in processes}, time.monotonic() + _SECONDS
        while running and (ended := wait(list(running), deadline - time.monotonic())):
            # Others would wait for a rank that has failed.
            if any([running.pop(sentinel).exitcode for sentinel in ended]):
                break
        for process in processes:
            process.kill()
            process.join()
        said = "".join(output.read_text(errors="replace")[-20000:] for output in outputs if output.exists())
    assert not any(process.exitcode for process in processes), said


def _run(command: Sequence[str], environment: dict[str, str], output: Path) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


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

"""DeepSpeed's compiled operation, loaded so that a process killed meanwhile holds up nobody after it."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from subprocess import SubprocessError

import psutil
from deepspeed.comm.torch import build_shm_op
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory

from adapeft.errors import AdapeftError

_NAME = "deepspeed_shm_comm"
_LOAD_SECONDS = 2.0
"""Longer than torch holds its guard when there is nothing to compile."""


def load_compiled() -> None:
    """Compiles the shared-memory operation where that was not done yet, and loads it.

    torch guards compiling with a file that is removed afterwards, and a process that finds it waits for as long as it
    is there: forever, when its maker was killed. So only one of our processes on this machine at a time gets to torch's
    guard, behind a lock that the kernel takes back from the dead. A guard that is there then is another program's, such
    as a Trainer's with DeepSpeed, or nobody's: without a process that compiles in the folder it is removed.

    Raises:
        AdapeftError: it cannot be compiled here.
    """
    folder = Path(_get_build_directory(_NAME, False))
    with FileLock(folder / "adapeft.lock"):
        while _is_held(folder / "lock"):
            time.sleep(0.1)
        (folder / "lock").unlink(missing_ok=True)
        try:
            build_shm_op()
        except (RuntimeError, OSError, SubprocessError) as error:
            lines = str(error).splitlines()
            cause = next((line for line in lines if "error: " in line), lines[0] if lines else type(error).__name__)
            raise AdapeftError(
                f"DeepSpeed cannot compile {_NAME} on {socket.gethostname()}: {cause.strip()}. It takes a C++ compiler "
                "and Python's headers: on Debian and Ubuntu, apt-get install g++ python3-dev."
            ) from error


def _is_held(guard: Path) -> bool:
    """Whether a living process may have made torch's guard: it is new, or something compiles next to it."""
    try:
        age = time.time() - guard.stat().st_mtime
    except FileNotFoundError:
        return False
    return age < _LOAD_SECONDS or any(
        process.info["cwd"] == str(guard.parent) for process in psutil.process_iter(["cwd"])
    )

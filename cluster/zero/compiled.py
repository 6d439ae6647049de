"""Loading of DeepSpeed's compiled operation; a process killed meanwhile does not block later ones."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from pathlib import Path
from subprocess import SubprocessError

import psutil
from deepspeed.comm.torch import build_shm_op
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory, get_default_build_root

from adapeft.errors import AdapeftError

_NAME = "deepspeed_shm_comm"
_LOAD_SECONDS = 2.0
"""Longer than torch holds its lock file when there is nothing to compile."""


def extensions_folder() -> Path:
    """Return ``TORCH_EXTENSIONS_DIR``, or a folder of this environment in torch's cache.

    torch shares one folder between all environments of a user, and the flags that it compiles with name the
    environment. Runs from two of them in turn would compile the operation at every start: 45 s on two cores.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return Path(given or f"{get_default_build_root()}/adapeft-{environment}")


def load_compiled() -> None:
    """Compile the shared-memory operation if necessary, and load it.

    torch guards compilation with a lock file. Other processes wait until it is removed, which is forever if the process
    that created it was killed. Therefore our processes on this machine take turns under a second lock, which the kernel
    releases when a process dies. A lock file of torch found then belongs to another program, such as a Trainer with
    DeepSpeed, or is stale: it is removed unless a process compiles in the folder.

    Raises:
        AdapeftError: the operation cannot be compiled on this machine.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
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
                f"DeepSpeed cannot compile {_NAME} on {socket.gethostname()}: {cause.strip()}. Install a C++ "
                "compiler and Python's headers; on Debian and Ubuntu: apt-get install g++ python3-dev."
            ) from error


def _is_held(guard: Path) -> bool:
    """Whether torch's lock file may belong to a live process: it is new, or a process runs in its folder."""
    try:
        age = time.time() - guard.stat().st_mtime
    except FileNotFoundError:
        return False
    return age < _LOAD_SECONDS or any(
        process.info["cwd"] == str(guard.parent) for process in psutil.process_iter(["cwd"])
    )

"""DeepSpeed's compiled operation, loaded so that a process killed meanwhile holds up nobody after it."""

from __future__ import annotations

import fcntl
from pathlib import Path

from deepspeed.comm.torch import build_shm_op
from torch.utils.cpp_extension import _get_build_directory

_NAME = "deepspeed_shm_comm"


def load_compiled() -> None:
    """Compiles the shared-memory operation where that was not done yet, and loads it.

    torch guards compiling with a file that is removed afterwards, and a process that finds it waits for as long as it
    is there: forever, when its maker was killed. So only one process of this machine at a time gets to torch's guard,
    behind a lock that the kernel takes back from the dead; what is there then is nobody's.
    """
    folder = Path(_get_build_directory(_NAME, False))
    with (folder / "adapeft.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        build_shm_op()

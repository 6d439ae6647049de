"""One command at a time in a folder: two that write the same files would undo each other."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from adapeft.errors import AdapeftError

LOCK = ".lock"


def hold(folder: Path) -> FileLock:
    """Keeps other commands out of ``folder``, which is made, until it is released or this process has ended.

    Where no lock can be had, as on storage without them or in a finished run that may only be read, nobody is kept out.

    Raises:
        AdapeftError: another command holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapeftError(
            f"output = {folder}: cannot be made ({error.strerror}). Give a folder on storage that can be written: "
            "output=…"
        ) from error
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise AdapeftError(
            f"output = {folder}: another adapeft command is writing there. Wait for its end or stop it, or give "
            "another folder: output=…"
        ) from None
    except OSError:
        pass  # what then cannot be written is told by what writes it
    return lock

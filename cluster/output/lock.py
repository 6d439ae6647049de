"""A lock that admits one command at a time to a folder, because two would overwrite each other's files."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from adapeft.errors import AdapeftError

LOCK = ".lock"


def hold(folder: Path) -> FileLock:
    """Create ``folder`` and lock it against other commands until the lock is released or this process ends.

    If locks are not available, as on storage without them or in a read-only finished run, no command is kept out.

    Raises:
        AdapeftError: another command holds the lock, or the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapeftError(
            f"output = {folder}: cannot be created ({error.strerror}). Give a folder on writable storage: output=…"
        ) from error
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise AdapeftError(
            f"output = {folder}: another adapeft command is writing there. Wait until it ends, stop it, or give "
            "another folder: output=…"
        ) from None
    except OSError:
        pass  # if the folder is not writable either, the first write reports it
    return lock

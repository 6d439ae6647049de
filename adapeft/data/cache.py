"""The cache that the processes of a machine share: folders of files under the cache of ``datasets``, mapped to memory.

A folder is named by the hash of everything that its content depends on. One process makes it under another name and
renames it while the others wait, so that what is read is always whole. Folders can be deleted at any time.
"""

from __future__ import annotations

import errno
import json
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import xxhash
from filelock import FileLock, Timeout

from adapeft.data.content import file_hash
from adapeft.errors import AdapeftError

Progress = Callable[[int, int], None]
"""Callback of the number of rows that are done, and the number of all rows."""

_FORMAT = 1
"""Version of what the makers of this package write; raised when the same key gives other files."""
_RECORD = "content.json"
_POLL_SECONDS = 0.5
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


def _ignore(done: int, total: int) -> None:
    """Discard the progress."""


@dataclass(frozen=True)
class Cache:
    """The cache of this machine; ``progress`` is called by the process that makes an entry and by those that wait."""

    progress: Progress = _ignore

    def folder(self, kind: str, key: Mapping[str, Any], make: Callable[[Path, Progress], None]) -> Path:
        """Return the folder of ``key``, made by the first process that asks for it.

        Args:
            kind: kind of entry, the start of the folder's name.
            key: everything that the content depends on, as JSON.
            make: function that writes files into a folder and calls the progress; not called if the folder exists.

        Raises:
            AdapeftError: the cache cannot be written.
        """
        key = json.loads(json.dumps({"format": _FORMAT, "datasets": datasets.__version__, **key}))
        root = Path(datasets.config.HF_DATASETS_CACHE) / "adapeft"
        name = f"{kind}-{xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True).encode())}"
        folder = root / name
        if _is_whole(folder, key):
            return folder
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(root / f"{name}.lock")
            _acquire(lock, root / f"{name}.progress", self.progress)
        try:
            if not _is_whole(folder, key):  # otherwise another process has made it in the meantime
                with _writing(root):
                    self._make(folder, key, make)
        finally:
            lock.release()
        return folder

    def _make(self, folder: Path, key: Mapping[str, Any], make: Callable[[Path, Progress], None]) -> None:
        """Make the folder; the lock is held."""
        # Names of this machine: should the lock of a shared file system not hold between machines, each makes its own.
        mark = f"{folder.name}.{socket.gethostname()}."
        for left in folder.parent.glob(f"{mark}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial = folder.with_name(f"{mark}{uuid.uuid4().hex}")
        partial.mkdir()
        shown = folder.with_name(f"{folder.name}.progress")
        try:
            make(partial, _also_written(shown, self.progress))
            files = {path.name: [path.stat().st_size, file_hash(path)] for path in sorted(partial.iterdir())}
            (partial / _RECORD).write_text(json.dumps({"key": key, "files": files}, indent=1))
            if folder.exists():
                warnings.warn(f"{folder}: is damaged or incomplete, and was made again.", stacklevel=4)
                shutil.rmtree(folder)
            try:
                partial.rename(folder)
            except OSError:
                if not _is_whole(folder, key):  # made by another machine, on a file system without locks
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shown.unlink(missing_ok=True)


def _is_whole(folder: Path, key: Mapping[str, Any]) -> bool:
    """Return whether the folder is that of ``key`` and its files are as they were written; reads all of them."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        return record["key"] == key and all(
            (folder / name).stat().st_size == size and file_hash(folder / name) == content
            for name, (size, content) in record["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _acquire(lock: FileLock, shown: Path, progress: Progress) -> None:
    """Acquire the lock, which the system releases when its holder dies, and pass on the holder's progress."""
    while True:
        try:
            lock.acquire(timeout=_POLL_SECONDS)
            return
        except Timeout:
            with suppress(OSError, ValueError):
                done, total = map(int, shown.read_text().split())
                progress(done, total)


def _also_written(shown: Path, progress: Progress) -> Progress:
    """Return ``progress`` that also writes the numbers to a file for the processes that wait."""
    last = time.monotonic()

    def written(done: int, total: int) -> None:
        nonlocal last
        progress(done, total)
        if time.monotonic() - last >= _POLL_SECONDS:
            last = time.monotonic()
            shown.write_text(f"{done} {total}")

    return written


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn errors of writing into ``AdapeftError`` within the context."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise AdapeftError(
            f"HF_DATASETS_CACHE = {root.parent}: the cache of datasets cannot be written ({error.strerror}). Set the "
            "environment variable HF_DATASETS_CACHE to a folder on a local disk with enough space, on every machine."
        ) from error

"""A run's folder at a URL: worked on in a folder of this machine, and kept the same in the storage.

Under the URL every file of the folder has its place by name, so that other tools can read it; a folder of files that
only count together (a checkpoint of all ranks) is one object, ``checkpoints.tar``. So whatever is put is there whole or
not at all, and a machine that goes on finds nothing half written.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from adapeft.errors import AdapeftError
from adapeft.files.artifact import replacing, save_json
from adapeft.sections.paths import has_password, is_url
from cluster.failure import WorkerError
from cluster.output.place import RECORD, working_folder

INTERVAL = 10.0
"""Least seconds between two looks at what has changed, while a stage goes on."""

_PLAIN = "logs"  # its files are read one by one
_TAR = ".tar"
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
# What no second try changes.
_LASTING = (FileNotFoundError, PermissionError, NotImplementedError, ValueError)
# There a folder is but a part of names, and to make one can mean to make a bucket.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"}

T = TypeVar("T")
State = dict[str, list[int]]
"""Path in the folder → size, and time of the last change in nanoseconds."""


def fetched(place: str, names: Iterable[str] | None = None) -> Path:
    """The folder of ``place`` on this machine, with what a URL holds; of ``names`` alone, where some are given.

    Raises:
        AdapeftError: there is no such URL, or it cannot be read.
    """
    if is_url(place):
        mirror = Mirror(place)
        mirror.fetch(names)
        if not mirror.folder.is_dir():
            raise AdapeftError(f"{place}: nothing is there.")
    return working_folder(place)


class Mirror:
    """Keeps a working folder and its URL the same.

    Which of the two is ahead is told by a record in the folder, of what the storage had when they last were the same:
    what has changed there since is another machine's, and is taken; otherwise the folder is as new or newer.

    Args:
        url: what fsspec takes (``s3://bucket/runs/mine``).
        pause: waits so many seconds between two tries.

    Raises:
        AdapeftError: no such protocol, its package is missing, or a password is in the URL.
    """

    def __init__(self, url: str, pause: Callable[[float], None] = time.sleep) -> None:
        if has_password(url):
            raise AdapeftError(
                "output: has a password in its URL, which logs and lists of jobs would show. Leave it out."
            )
        self.url, self.folder, self._pause = url.rstrip("/"), working_folder(url), pause
        try:
            self._files, self._root = url_to_fs(self.url, use_listings_cache=False)
        except Exception as error:  # every kind of storage raises its own
            raise AdapeftError(f"{url}: {error}. Give a folder, or install what its URL needs.") from error
        protocols = {self._files.protocol} if isinstance(self._files.protocol, str) else set(self._files.protocol)
        self._has_folders = not protocols & _BUCKETS
        self._looked = float("-inf")
        self.has_failed = False
        """Whether the storage has refused something, whatever was tried."""
        path = self.folder / RECORD
        self._record: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def fetch(self, names: Iterable[str] | None = None, *, over: bool = False) -> None:
        """Takes from the storage what has changed there, of ``names`` (files and folders) or of everything.

        What is gone there goes here too. What has changed here stays, unless all machines are to go on from one state:
        ``over`` makes the folder what the storage has.

        Raises:
            AdapeftError: it is not there, or not for this user.
            WorkerError: it cannot be read, whatever was tried.
        """
        there = self._reach("cannot be read", self._there)
        wanted = there.keys() if names is None else {option for name in names for option in (name, name + _TAR)}
        for name in sorted(there.keys() & wanted):
            known = self._record.get(name, {})
            if known.get("key") != there[name] or (over and known["state"] != self._state(name)):
                self._reach("cannot be read", partial(self._take, name))
                self._note(name, there[name], self._state(name))
        for name in sorted({*self._record, *(self._here() if over else ())} - there.keys()):
            known = self._record.pop(name, {})
            if over or known["state"] == self._state(name):
                self._drop(name)
            self._save_record()

    def put(self) -> None:
        """Puts what has changed in the folder, and removes from the storage what is gone from it.

        What changes while it is being packed is left for the next time.

        Raises:
            AdapeftError: there is no such place, or not for this user; or another machine writes there too.
            WorkerError: the storage refuses it, whatever was tried. The files are still in the folder.
        """
        self._looked = time.monotonic()
        self._put_files()
        here = self._here()
        for name in here:
            if name.endswith(_TAR) and (state := self._changed(name)):
                with _packed(self.folder, name, state) as path:
                    if path is not None and self._state(name) == state:
                        # A checkpoint counts on the files that were written before it, such as the best delta.
                        self._put_files()
                        self._put(name, path, state)
        for name in [name for name in self._record if name not in here]:
            self._reach("cannot be removed", partial(self._remove, name))
            self._record.pop(name)
            self._save_record()

    def look(self) -> None:
        """As ``put``, every ``INTERVAL`` seconds at most."""
        if time.monotonic() - self._looked >= INTERVAL:
            self.put()

    def _put_files(self) -> None:
        for name in self._here():
            if not name.endswith(_TAR) and (state := self._changed(name)):
                self._put(name, self.folder / name, state)

    def _put(self, name: str, path: Path, state: State) -> None:
        self._check_is_ours(name)
        self._note(name, self._reach("cannot be written", partial(self._send, path, name)), state)

    def _check_is_ours(self, name: str) -> None:
        """Refuses to write over what another machine has put since this one looked: they would undo each other."""
        there = self._reach("cannot be read", partial(self._key_of, name))
        if there is not None and there != self._record.get(name, {}).get("key"):
            self.has_failed = True
            raise AdapeftError(
                f"{self.url}: another machine has written {name} there meanwhile. Stop one of the two runs, or give "
                f"one an output of its own. What was made here is in {self.folder}."
            )

    def _key_of(self, name: str) -> str | None:
        try:
            return self._key(self._files.info(self._path(name)))
        except FileNotFoundError:
            return None

    def _changed(self, name: str) -> State | None:
        """Its state, where that is another than the storage has."""
        state = self._state(name)
        return state if state != self._record.get(name, {}).get("state") else None

    def _send(self, path: Path, name: str) -> str:
        """Under another name first: not every storage shows a file only when it is whole."""
        target = self._path(name)
        head, _, tail = target.rpartition("/")
        temporary = f"{head}/.{tail}.partial"
        if self._has_folders:
            self._files.makedirs(head, exist_ok=True)
        self._files.put_file(str(path), temporary)
        self._files.mv(temporary, target)
        return self._key(self._files.info(target))

    def _take(self, name: str) -> None:
        target = self.folder / name
        if not name.endswith(_TAR):
            with replacing(target) as temporary:
                self._files.get_file(self._path(name), str(temporary))
            return
        final = target.with_suffix("")
        final.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as made:
            archive, unpacked = Path(made, "archive"), Path(made, final.name)
            self._files.get_file(self._path(name), str(archive))
            with tarfile.open(archive, "r:") as tar:
                # Nothing leaves the folder, whoever wrote the archive.
                tar.extractall(unpacked, filter="data")
            if final.exists():
                final.rename(Path(made, "old"))
            unpacked.rename(final)

    def _drop(self, name: str) -> None:
        path = self.folder / name.removesuffix(_TAR)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        try:
            self._files.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def _there(self) -> dict[str, str]:
        """Name → what tells its content from another, of all in the storage."""
        self._files.invalidate_cache()
        names = [str(path)[len(self._path("")) :] for path in self._files.find(self._root)]
        # A listing may tell less of a file, or spell it otherwise, than the file's own entry.
        return {name: self._key(self._files.info(self._path(name))) for name in names if _is_ours(name)}

    def _here(self) -> list[str]:
        """Names of what the folder holds, as the storage has them."""
        names = []
        for path in sorted(self.folder.glob("[!.]*")):
            if path.name == _PLAIN:
                names += [f"{_PLAIN}/{file.name}" for file in sorted(path.glob("[!.]*")) if file.is_file()]
            else:
                names.append(path.name + (_TAR if path.is_dir() else ""))
        return names

    def _state(self, name: str) -> State:
        path = self.folder / name.removesuffix(_TAR)
        files = [path] if path.is_file() else path.rglob("*")
        state = {}
        for file in files:
            place = file.relative_to(self.folder)
            try:
                if file.is_file() and not any(part.startswith(".") for part in place.parts):
                    state[str(place)] = [file.stat().st_size, file.stat().st_mtime_ns]
            except FileNotFoundError:  # just removed
                continue
        return dict(sorted(state.items()))

    def _note(self, name: str, key: str, state: State) -> None:
        self._record[name] = {"key": key, "state": state}
        self._save_record()

    def _save_record(self) -> None:
        save_json(self.folder / RECORD, self._record)

    @staticmethod
    def _key(info: Mapping[str, Any]) -> str:
        """What tells a file's content from another's: a hash where the storage has one, else when it was written."""
        told = [
            info[field] for field in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if field in info
        ]
        return " ".join(map(str, [info["size"], *told[:1]]))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _reach(self, what: str, call: Callable[[], T]) -> T:
        """What ``call`` returns; tried again where trying again may help."""
        for pause in (*_PAUSES, None):
            try:
                return call()
            except Exception as error:  # every kind of storage raises its own
                if pause is None or isinstance(error, _LASTING):
                    self.has_failed = True
                    kind = AdapeftError if isinstance(error, _LASTING) else WorkerError
                    raise kind(
                        f"{self.url}: {what} ({type(error).__name__}: {error}). Is the URL right, the storage up, and "
                        f"are you allowed in? What was made here is in {self.folder}; the same command goes on with it."
                    ) from error
            self._pause(pause)
        raise AssertionError


@contextmanager
def _packed(folder: Path, name: str, state: State) -> Iterator[Path | None]:
    """An archive of the files in ``state``; None when one has gone meanwhile."""
    root = name.removesuffix(_TAR)
    with TemporaryDirectory(dir=folder, prefix=f".{root}.") as made:
        path: Path | None = Path(made, name)
        try:
            with tarfile.open(path, "w") as tar:
                for place in state:
                    tar.add(folder / place, str(Path(place).relative_to(root)), recursive=False)
        except FileNotFoundError:
            path = None
        yield path


def _is_ours(name: str) -> bool:
    """Whether it is a name that ``put`` gives: of the folder itself or of its logs, and not hidden."""
    parts = name.split("/")
    return not any(part in ("", "..") or part.startswith(".") for part in parts) and (
        len(parts) == 1 or (len(parts) == 2 and parts[0] == _PLAIN)
    )

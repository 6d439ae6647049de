"""A run's folder at a URL: the run works in a local folder that is kept in sync with the storage.

Files keep their names under the URL, so that other tools can read them; a folder whose files only make sense together
(a checkpoint of all ranks) is one object, ``checkpoints.tar``. So every object is complete or absent, and a machine
that resumes the run finds nothing half written.
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
"""Minimum number of seconds between two checks for changed files during a stage."""

_PLAIN = "logs"  # a folder whose files are uploaded one by one, because they are read one by one
_TAR = ".tar"
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
# Errors that a retry does not fix.
_LASTING = (FileNotFoundError, PermissionError, NotImplementedError, ValueError)
# In these a folder is only a prefix of names, and creating one could create a bucket.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"}

T = TypeVar("T")
State = dict[str, list[int]]
"""Path in the folder → size, and time of the last change in nanoseconds."""


def fetched(place: str, names: Iterable[str] | None = None) -> Path:
    """Return the local folder of ``place``, after downloading a URL's content, or only ``names`` of it.

    Raises:
        AdapeftError: the URL does not exist or cannot be read.
    """
    if is_url(place):
        mirror = Mirror(place)
        mirror.fetch(names)
        if not mirror.folder.is_dir():
            raise AdapeftError(f"{place}: nothing is there.")
    return working_folder(place)


class Mirror:
    """Keeps a working folder and its URL in sync.

    A record in the folder holds the state of the storage at the last sync. Files that have changed there since come
    from another machine and are downloaded; for all others the folder is as new or newer.

    Args:
        url: URL that fsspec supports (``s3://bucket/runs/mine``).
        pause: function that waits for a number of seconds between two tries.

    Raises:
        AdapeftError: the protocol is unknown, its package is missing, or the URL holds a password.
    """

    def __init__(self, url: str, pause: Callable[[float], None] = time.sleep) -> None:
        if has_password(url):
            raise AdapeftError(
                "output: the URL holds a password, which logs and lists of jobs would show. Leave it out."
            )
        self.url, self.folder, self._pause = url.rstrip("/"), working_folder(url), pause
        try:
            self._files, self._root = url_to_fs(self.url, use_listings_cache=False)
        except Exception as error:  # every kind of storage raises its own
            raise AdapeftError(f"{url}: {error}. Give a folder, or install the package that its URL needs.") from error
        protocols = {self._files.protocol} if isinstance(self._files.protocol, str) else set(self._files.protocol)
        self._has_folders = not protocols & _BUCKETS
        self._looked = float("-inf")
        self.has_failed = False
        """Whether an access to the storage has failed despite retries."""
        path = self.folder / RECORD
        self._record: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def fetch(self, names: Iterable[str] | None = None, *, over: bool = False) -> None:
        """Download the files that have changed in the storage, all or only ``names`` (files and folders).

        Files that were removed there are removed here. Local changes stay, unless ``over``, which makes the folder
        equal to the storage, so that all machines resume from one state.

        Raises:
            AdapeftError: the URL does not exist, or this user has no access.
            WorkerError: the storage cannot be read despite retries.
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
        """Upload the files that have changed in the folder, and remove from the storage those that are gone from it.

        Files that change while they are being packed are left for the next call.

        Raises:
            AdapeftError: the URL does not exist, this user has no access, or another machine writes there too.
            WorkerError: the storage cannot be written despite retries. The files are still in the folder.
        """
        self._looked = time.monotonic()
        self._put_files()
        here = self._here()
        for name in here:
            if name.endswith(_TAR) and (state := self._changed(name)):
                with _packed(self.folder, name, state) as path:
                    if path is not None and self._state(name) == state:
                        # A checkpoint depends on files that were written before it, such as the best delta.
                        self._put_files()
                        self._put(name, path, state)
        for name in [name for name in self._record if name not in here]:
            self._reach("cannot be removed", partial(self._remove, name))
            self._record.pop(name)
            self._save_record()

    def look(self) -> None:
        """Call ``put``, at most once every ``INTERVAL`` seconds."""
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
        """Check that no other machine has written the file since the last sync.

        Two machines writing to one URL would overwrite each other's files.
        """
        there = self._reach("cannot be read", partial(self._key_of, name))
        if there is not None and there != self._record.get(name, {}).get("key"):
            self.has_failed = True
            raise AdapeftError(
                f"{self.url}: another machine has written {name} there in the meantime. Stop one of the two runs, or "
                f"give one of them another output. The results of this run are in {self.folder}."
            )

    def _key_of(self, name: str) -> str | None:
        try:
            return self._key(self._files.info(self._path(name)))
        except FileNotFoundError:
            return None

    def _changed(self, name: str) -> State | None:
        """Return the state of a file or folder if it differs from the storage's, else None."""
        state = self._state(name)
        return state if state != self._record.get(name, {}).get("state") else None

    def _send(self, path: Path, name: str) -> str:
        """Upload under a temporary name and rename, because some storages show a file before it is complete.

        Returns the key of the uploaded file.
        """
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
                # The filter keeps members inside the folder, even if the archive is malicious.
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
        """Return name → key of the content, for all of the run's objects in the storage."""
        self._files.invalidate_cache()
        names = [str(path)[len(self._path("")) :] for path in self._files.find(self._root)]
        # A listing may have fewer fields of a file than its own entry, or spell them differently.
        return {name: self._key(self._files.info(self._path(name))) for name in names if _is_ours(name)}

    def _here(self) -> list[str]:
        """Return the names of the folder's entries as they are in the storage."""
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
        """Return a key of a file's content: its size, and a hash if the storage has one, else the time of writing."""
        marks = [
            info[field] for field in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if field in info
        ]
        return " ".join(map(str, [info["size"], *marks[:1]]))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _reach(self, what: str, call: Callable[[], T]) -> T:
        """Return the result of ``call``, retrying after errors that may be temporary."""
        for pause in (*_PAUSES, None):
            try:
                return call()
            except Exception as error:  # every kind of storage raises its own
                if pause is None or isinstance(error, _LASTING):
                    self.has_failed = True
                    kind = AdapeftError if isinstance(error, _LASTING) else WorkerError
                    raise kind(
                        f"{self.url}: {what} ({type(error).__name__}: {error}). Check the URL, the storage and your "
                        f"permissions. The results so far are in {self.folder}; the same command resumes from them."
                    ) from error
            self._pause(pause)
        raise AssertionError


@contextmanager
def _packed(folder: Path, name: str, state: State) -> Iterator[Path | None]:
    """Yield the path of an archive of the files in ``state``; None if one of them was removed in the meantime."""
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
    """Whether ``put`` uses such a name: one of the folder itself or of its logs, and not hidden."""
    parts = name.split("/")
    return not any(part in ("", "..") or part.startswith(".") for part in parts) and (
        len(parts) == 1 or (len(parts) == 2 and parts[0] == _PLAIN)
    )

"""A folder or bucket of named subsets, which many machines may read and write at once.

An entry is two files. ``NAME@TOKEN.safetensors`` is the subset, under a token that each writer draws for itself;
``NAME.json`` says which token counts, and what the subset is. The subset is written first. Then ``NAME.json`` is
created where none may be yet, the one step that a folder (hard link) and a bucket (conditional put) both do atomically.
So an entry is there whole or not at all; of several writers of one name one wins, and none touches a file of another;
there is no index or lock that a killed writer could leave behind wrong. Entries never change.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.sections.paths import SUBSET_SUFFIX
from adapeft.subset.entry import Entry, Summary, check_name

STORE_VARIABLE = "ADAPEFT_STORE"
HALF_WRITTEN = "half written"
_WRITTEN = re.compile(r"(.+)@[0-9a-f]{32}\.(?:safetensors|entry)")
# Those whose fsspec interface creates a file only where there is none; that of the others looks first and then writes.
_EXCLUSIVE = {"file", "local", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
# A younger file without an entry may belong to a writer that is still at work.
_ABANDONED = timedelta(hours=1)


def default_store() -> str:
    """``$ADAPEFT_STORE``, else a folder of the user's data: a cache may be emptied, and a choice took hours to make."""
    return os.environ.get(STORE_VARIABLE) or str(_home("XDG_DATA_HOME", "~/.local/share"))


class SubsetStore:
    """Named subsets under a URL.

    Args:
        url: folder, or what fsspec takes (``s3://bucket/subsets``); ``default_store()`` when None.

    Raises:
        AdapeftError: no such protocol, or its package is missing.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or default_store()
        try:
            self._files, self._root = url_to_fs(self.url, use_listings_cache=False)
        except Exception as error:  # every kind of storage raises its own
            raise AdapeftError(f"store = {self.url}: {error}. Give a folder, or install what its URL needs.") from error
        self._folder = Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    def entries(self) -> tuple[list[Entry], dict[str, str]]:
        """The whole entries, and by name what is wrong with the others; the subsets themselves are not read.

        Raises:
            AdapeftError: the store cannot be reached.
        """
        with self._reaching():
            sizes = self._sizes()
            paths = {self._path(f"{name}.json"): name for name in _entry_names(sizes)}
            contents = self._files.cat(list(paths), on_error="return") if paths else {}
            half_written = {_name_of_file(file) for file in sizes} - {"", *paths.values()}
            entries, broken = [], dict.fromkeys(sorted(half_written), HALF_WRITTEN)
            for path, name in paths.items():
                try:
                    entry = self._parse(name, contents[path])
                    # A listing may hold the entry of a writer at work and not yet the subset that was there before.
                    self._check_size(entry, sizes.get(entry.file) or self._size(entry.file))
                    entries.append(entry)
                except AdapeftError as error:
                    if self._content(f"{name}.json") is not None:  # else it was removed meanwhile
                        broken[name] = str(error)
        return entries, broken

    def get(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            AdapeftError: there is none, or it is damaged.
        """
        check_name(name)
        with self._reaching():
            content = self._content(f"{name}.json")
            if content is None:
                known = _entry_names(self._sizes())
        if content is None:
            raise AdapeftError(
                f"{name!r}: no such subset in the store {self.url}.{did_you_mean(name, known)} `adapeft subsets list` "
                f"lists them; a path has a slash or ends in {SUBSET_SUFFIX}."
            )
        return self._parse(name, content)

    def fetch(self, entry: Entry) -> Path:
        """The subset's file on this machine, its hash verified; what came from a bucket is kept in the user's cache.

        Raises:
            AdapeftError: the file is missing, truncated or another.
        """
        if self._folder is not None:
            path = self._folder / entry.file
            self._check_size(entry, path.stat().st_size if path.is_file() else None)
            self._check_hash(entry, hash_of(path))
            return path
        kept = _kept(entry.sha256)
        if kept.is_file() and hash_of(kept) == entry.sha256:
            return kept
        with self._reaching():
            content = self._content(entry.file)
        self._check_size(entry, None if content is None else len(content))
        assert content is not None
        self._check_hash(entry, hashlib.sha256(content).hexdigest())
        return _keep(content)

    def add(self, name: str, path: Path, summary: Summary) -> Entry:
        """Stores the file at ``path`` under a new name.

        Raises:
            AdapeftError: the name is taken or not possible, or the store takes no entries safely.
        """
        check_name(name)
        protocols = self._files.protocol if isinstance(self._files.protocol, tuple) else (self._files.protocol,)
        if _EXCLUSIVE.isdisjoint(protocols):
            raise AdapeftError(f"store = {self.url}: cannot refuse a name that is taken; give a folder or a bucket.")
        entry = Entry(
            name=name,
            token=uuid4().hex,
            size=path.stat().st_size,
            sha256=hash_of(path),
            added=datetime.now(UTC),
            summary=summary,
        )
        with self._reaching():
            if self._content(f"{name}.json") is not None:
                raise self._taken(name)
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._files.put_file(str(path), self._path(entry.file))
            if not self._create(entry):
                self._files.rm_file(self._path(entry.file))
                raise self._taken(name)
        return entry

    def remove(self, name: str) -> None:
        """Takes away an entry, whole or damaged, and what interrupted writers of the name left over an hour ago.

        Raises:
            AdapeftError: there is nothing of that name to take away.
        """
        check_name(name)
        with self._reaching():
            sizes = self._sizes()
            own = None
            with suppress(AdapeftError):
                own = self._parse(name, self._content(f"{name}.json") or b"").file
            # The entry goes first: nobody is to find one whose file is gone.
            doomed = [f"{name}.json"] if f"{name}.json" in sizes else []
            of_name = [file for file in sizes if _name_of_file(file) == name]
            doomed += [file for file in of_name if file == own or self._is_abandoned(file)]
            for file in doomed:
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._path(file))
        if not doomed and of_name:
            raise AdapeftError(
                f"{name!r} is {HALF_WRITTEN}, and its writer may still be at work: remove it after an hour. The name "
                f"is free."
            )
        if not doomed:
            self.get(name)

    def _create(self, entry: Entry) -> bool:
        """Creates ``NAME.json``; False where another writer's is there."""
        path, content = self._path(f"{entry.name}.json"), entry.model_dump_json(indent=2).encode()
        try:
            if self._folder is None:
                self._files.pipe_file(path, content, mode="create")
            else:
                # A link refuses a name that is taken, as a rename does not, and shows no half of a file.
                temporary = self._folder / f"{entry.name}@{entry.token}.entry"
                try:
                    temporary.write_bytes(content)
                    os.link(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError:
            # What a refused put raises depends on the bucket, and a client that tries twice may be refused by itself.
            found = self._content(f"{entry.name}.json")
            if found is None:
                raise
            return found == content
        return True

    def _parse(self, name: str, content: bytes | Exception) -> Entry:
        if isinstance(content, Exception):
            raise AdapeftError(f"{self._damaged(name)} ({content}).")
        try:
            entry = Entry.model_validate_json(content)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise AdapeftError(f"{self._damaged(name)}: {name}.json is no entry, or truncated ({reason}).") from error
        if entry.name != name:
            raise AdapeftError(f"{self._damaged(name)}: {name}.json is the entry of {entry.name!r}.")
        return entry

    def _check_size(self, entry: Entry, size: int | None) -> None:
        if size is None:
            raise AdapeftError(f"{self._damaged(entry.name)}: {entry.file} is missing.")
        if size != entry.size:
            raise AdapeftError(f"{self._damaged(entry.name)}: {entry.file} has {size} bytes, not {entry.size}.")

    def _check_hash(self, entry: Entry, found: str) -> None:
        if found != entry.sha256:
            raise AdapeftError(f"{self._damaged(entry.name)}: {entry.file} is not the file that was added.")

    def _damaged(self, name: str) -> str:
        return f"{name!r} is damaged (`adapeft subsets remove {name}` and add it again)"

    def _taken(self, name: str) -> AdapeftError:
        return AdapeftError(f"{name!r} is taken in the store {self.url}. Take another name, or remove that one.")

    def _content(self, file: str) -> bytes | None:
        """What is in a file; None where there is none."""
        try:
            return self._files.cat_file(self._path(file))
        except FileNotFoundError:
            return None

    def _size(self, file: str) -> int | None:
        try:
            return self._files.info(self._path(file))["size"]
        except FileNotFoundError:
            return None

    def _sizes(self) -> Mapping[str, int]:
        """File → bytes, of all that is in the store; a store that nobody has written to is empty."""
        try:
            found = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {str(info["name"]).rpartition("/")[2]: info["size"] for info in found if info["type"] == "file"}

    def _is_abandoned(self, file: str) -> bool:
        return datetime.now(UTC) - self._files.modified(self._path(file)) > _ABANDONED

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except AdapeftError:
            raise
        except Exception as error:  # every kind of storage raises its own
            raise AdapeftError(
                f"store = {self.url}: {type(error).__name__}: {error}. Is the URL right, and are you allowed in?"
            ) from error


def download(url: str) -> Path:
    """A copy, in the user's cache, of the file at a URL.

    Raises:
        AdapeftError: it cannot be read.
    """
    try:
        files, path = url_to_fs(url)
        content = files.cat_file(path)
    except Exception as error:  # every kind of storage raises its own
        raise AdapeftError(f"{url}: cannot be read ({type(error).__name__}: {error}).") from error
    return _keep(content)


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(content: bytes) -> Path:
    path = _kept(hashlib.sha256(content).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by artifact.replacing: that module waits for torch, which listing a store does without.
    temporary = path.with_name(f".{uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


def _kept(sha256: str) -> Path:
    return _home("XDG_CACHE_HOME", "~/.cache") / f"{sha256}{SUBSET_SUFFIX}"


def _home(variable: str, otherwise: str) -> Path:
    return Path(os.environ.get(variable) or otherwise).expanduser() / "adapeft" / "subsets"


def _name_of_file(file: str) -> str:
    """The name that a writer's file was written for, empty for other files."""
    match = _WRITTEN.fullmatch(file)
    return match[1] if match else ""


def _entry_names(files: Mapping[str, int]) -> list[str]:
    return sorted(file.removesuffix(".json") for file in files if file.endswith(".json"))

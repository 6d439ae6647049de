"""A folder or bucket of named subsets that many machines can read and write concurrently.

An entry consists of two files. ``NAME@TOKEN.safetensors`` is the subset, with a random token of its writer;
``NAME.json`` contains the valid token and the description of the subset. The subset is written first. Then
``NAME.json`` is created only if it does not exist, the one step that is atomic both in a folder (hard link) and in a
bucket (conditional put). So an entry is either complete or absent. If several writers use the same name, one wins, and
none touches a file of another. There is no index or lock that a killed writer could leave in a wrong state. Entries
never change.
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
# Protocols whose fsspec interface can create a file only if it does not exist; others check first and then write.
_EXCLUSIVE = {"file", "local", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
# A younger file without an entry may belong to an active writer.
_ABANDONED = timedelta(hours=1)


def default_store() -> str:
    """Return ``$ADAPEFT_STORE``, or a folder in the user's data.

    It is not in the user's cache, because a cache may be emptied, and a choice can take hours.
    """
    return os.environ.get(STORE_VARIABLE) or str(_home("XDG_DATA_HOME", "~/.local/share"))


class SubsetStore:
    """Named subsets under a URL.

    Args:
        url: folder or URL for fsspec (``s3://bucket/subsets``); None uses ``default_store()``.

    Raises:
        AdapeftError: the protocol is unknown, or its package is missing.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or default_store()
        try:
            self._files, self._root = url_to_fs(self.url, use_listings_cache=False)
        except Exception as error:  # exceptions depend on the kind of storage
            raise AdapeftError(
                f"store = {self.url}: {error}. Specify a folder, or install the package that its URL needs."
            ) from error
        self._folder = Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    def entries(self) -> tuple[list[Entry], dict[str, str]]:
        """Return the complete entries, and the errors of the others by name. The subsets themselves are not read.

        Raises:
            AdapeftError: the store cannot be accessed.
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
                    # A listing during a write may contain the entry without the subset that was written before it.
                    self._check_size(entry, sizes.get(entry.file) or self._size(entry.file))
                    entries.append(entry)
                except AdapeftError as error:
                    if self._content(f"{name}.json") is not None:  # otherwise it was removed in the meantime
                        broken[name] = str(error)
        return entries, broken

    def get(self, name: str) -> Entry:
        """Return the entry of this name.

        Raises:
            AdapeftError: there is no such entry, or it is damaged.
        """
        check_name(name)
        with self._reaching():
            content = self._content(f"{name}.json")
            if content is None:
                known = _entry_names(self._sizes())
        if content is None:
            raise AdapeftError(
                f"{name!r}: no such subset in the store {self.url}.{did_you_mean(name, known)} `adapeft subsets list` "
                f"lists them. A path must contain a slash or end in {SUBSET_SUFFIX}."
            )
        return self._parse(name, content)

    def fetch(self, entry: Entry) -> Path:
        """Return the local file of the subset, with a verified hash. Downloads are kept in the user's cache.

        Raises:
            AdapeftError: the file is missing, truncated or has another hash.
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
        """Store the file at ``path`` under a new name.

        Raises:
            AdapeftError: the name is taken or invalid, or the store cannot add entries atomically.
        """
        check_name(name)
        protocols = self._files.protocol if isinstance(self._files.protocol, tuple) else (self._files.protocol,)
        if _EXCLUSIVE.isdisjoint(protocols):
            raise AdapeftError(
                f"store = {self.url}: this storage cannot atomically refuse a name that is taken. Use a folder or a "
                f"bucket."
            )
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
        """Remove an entry, complete or damaged, and files that interrupted writers of the name left over an hour ago.

        Raises:
            AdapeftError: there is nothing of that name to remove.
        """
        check_name(name)
        with self._reaching():
            sizes = self._sizes()
            own = None
            with suppress(AdapeftError):
                own = self._parse(name, self._content(f"{name}.json") or b"").file
            # The entry is removed first, so that no reader finds an entry without its file.
            doomed = [f"{name}.json"] if f"{name}.json" in sizes else []
            of_name = [file for file in sizes if _name_of_file(file) == name]
            doomed += [file for file in of_name if file == own or self._is_abandoned(file)]
            for file in doomed:
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._path(file))
        if not doomed and of_name:
            raise AdapeftError(
                f"{name!r} is {HALF_WRITTEN}, and its writer may still be active. Remove it after an hour. The name is "
                f"free."
            )
        if not doomed:
            self.get(name)

    def _create(self, entry: Entry) -> bool:
        """Create ``NAME.json``; return False if that of another writer exists."""
        path, content = self._path(f"{entry.name}.json"), entry.model_dump_json(indent=2).encode()
        try:
            if self._folder is None:
                self._files.pipe_file(path, content, mode="create")
            else:
                # Unlike a rename, a link fails if the name is taken; and no reader sees a partial file.
                temporary = self._folder / f"{entry.name}@{entry.token}.entry"
                try:
                    temporary.write_bytes(content)
                    os.link(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError:
            # The exception of a refused put depends on the bucket, and a client's retry may be refused by its own put.
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
            raise AdapeftError(
                f"{self._damaged(name)}: {name}.json is not an entry, or is truncated ({reason})."
            ) from error
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
        return f"{name!r} is damaged (run `adapeft subsets remove {name}` and add it again)"

    def _taken(self, name: str) -> AdapeftError:
        return AdapeftError(f"{name!r} is taken in the store {self.url}. Use another name, or remove that entry.")

    def _content(self, file: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
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
        """Return the size in bytes of each file in the store; a store that does not exist yet is empty."""
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
        except Exception as error:  # exceptions depend on the kind of storage
            raise AdapeftError(
                f"store = {self.url}: {type(error).__name__}: {error}. Check the URL and your permissions."
            ) from error


def download(url: str) -> Path:
    """Download the file at a URL to the user's cache and return its path.

    Raises:
        AdapeftError: the URL cannot be read.
    """
    try:
        files, path = url_to_fs(url)
        content = files.cat_file(path)
    except Exception as error:  # exceptions depend on the kind of storage
        raise AdapeftError(f"{url}: cannot be read ({type(error).__name__}: {error}).") from error
    return _keep(content)


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(content: bytes) -> Path:
    path = _kept(hashlib.sha256(content).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without artifact.replacing, because that module imports torch, which listing a store does not need.
    temporary = path.with_name(f".{uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


def _kept(sha256: str) -> Path:
    return _home("XDG_CACHE_HOME", "~/.cache") / f"{sha256}{SUBSET_SUFFIX}"


def _home(variable: str, otherwise: str) -> Path:
    return Path(os.environ.get(variable) or otherwise).expanduser() / "adapeft" / "subsets"


def _name_of_file(file: str) -> str:
    """Return the entry name to which a writer's file belongs, or an empty string for other files."""
    match = _WRITTEN.fullmatch(file)
    return match[1] if match else ""


def _entry_names(files: Mapping[str, int]) -> list[str]:
    return sorted(file.removesuffix(".json") for file in files if file.endswith(".json"))

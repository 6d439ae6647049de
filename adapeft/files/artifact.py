"""Artifacts: safetensors, Parquet and JSON files, written to a temporary name and then renamed."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.files.damage import reading
from adapeft.files.json_numbers import dumps, loads

_KEY = "adapeft"
_MOST_VALUES_PER_BYTE = 128
"""Limit for Parquet files. Ours have about 5 in tables without statistics, and more only if all statistics are 0."""
_WAITS = (0.5, 2.0, 5.0)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LASTING = {
    *_FULL,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}
"""Permanent errors, for which a write is not retried. All others of a network file system may be transient."""


@cache
def provenance() -> dict[str, Any]:
    """Return the versions of Python and packages, and the git revision of adapeft if it runs from a checkout."""
    packages = ("adapeft", "torch", "transformers", "deepspeed", "ray", "ortools")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "versions": versions, "revision": _revision()}


def _revision() -> str | None:
    """Return the git revision of the checkout that this file belongs to; None if it belongs to none."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=False).stdout.strip()

    if not shutil.which("git"):
        return None
    # An environment within the checkout of another project, whose revision says nothing of adapeft, is not tracked.
    return git("rev-parse", "--short", "HEAD") or None if git("ls-files", here.name) else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, which is renamed to ``path`` on success and removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _share(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``out``, which is renamed to ``out`` on success and removed on an error.

    Raises:
        AdapeftError: ``out`` is not empty, or the disk is full.
    """
    check_new_folder(out)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _share(file)
        out.mkdir(parents=True, exist_ok=True)
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        if _errno(error) in _FULL:
            raise _not_written(out, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(out: Path) -> None:
    """Check that ``out`` does not exist or is an empty folder.

    Raises:
        AdapeftError: it is a file or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapeftError(f"--out {out}: not an empty folder. Give a new one.")


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write a temporary file and rename it to ``path``; retry after a short wait if storage fails.

    Raises:
        AdapeftError: the file cannot be written. An existing file is unchanged.
    """

    def replace() -> None:
        with replacing(path) as temporary:
            write(temporary)

    stored(path, replace)


def save_text(path: Path, text: str) -> None:
    """Write a text file with ``save``, as all writers here do."""
    save(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; see ``json_numbers`` for numbers that are not finite."""
    save_text(path, dumps(content, indent=2) + "\n")


def save_table(path: Path, table: pa.Table) -> None:
    save(path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


def load_table(path: Path) -> pa.Table:
    """Read a Parquet file.

    Raises:
        AdapeftError: the file is missing, truncated or not Parquet, or claims far more values than its bytes can hold.
    """
    # Not pq.read_table, which adds columns for folder names such as lr=1e-3/groups.parquet.
    with _reading(path, "a Parquet table"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        # A run of equal values takes a few bytes, whatever length it claims.
        _check_claim(path, file.metadata.num_rows)
        claimed = 0
        for index in range(file.metadata.num_row_groups):
            # Reading a row raises an error for a damaged column; RowGroupMetaData.column aborts the process.
            next(file.iter_batches(batch_size=1, row_groups=[index]), None)
            group = file.metadata.row_group(index)
            claimed += sum(group.column(i).num_values for i in range(group.num_columns))
        _check_claim(path, claimed)
        return file.read()


def _check_claim(path: Path, num_values: int) -> None:
    if num_values > _MOST_VALUES_PER_BYTE * path.stat().st_size:
        raise ValueError(f"it claims {num_values} values in {path.stat().st_size} bytes")


def save_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a safetensors file whose header has the ``kind`` of artifact, its description and its provenance."""
    header = {_KEY: dumps({**description, "kind": kind, "provenance": provenance()}), "format": "pt"}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save(path, lambda temporary: save_file(contiguous, temporary, metadata=header))


def stored(path: Path, action: Callable[[], Any]) -> None:
    """Run an ``action`` that writes ``path``, and retry it after a short wait if storage fails transiently.

    Raises:
        AdapeftError: the error is permanent or persists.
    """
    for wait in (*_WAITS, None):
        try:
            action()
            return
        except (OSError, SafetensorError) as error:
            if wait is None or _errno(error) in _LASTING:
                raise _not_written(path, error) from error
            time.sleep(wait)


def _not_written(path: Path, error: Exception) -> AdapeftError:
    return AdapeftError(
        f"{path}: cannot be written ({error}). Free space there, fix the storage or choose another folder; an "
        "existing file there is unchanged."
    )


def _errno(error: Exception) -> int | None:
    """Return the errno, which an error of safetensors has only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else None


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the description in a file of this ``kind``.

    Raises:
        AdapeftError: the file is missing, truncated, not safetensors, or another kind of artifact.
    """
    with _reading(path, f"a {kind}"), safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(_KEY)
        if header is None:
            raise AdapeftError(f"{path} is a safetensors file, but not one of adapeft's: expected a {kind}.")
        description = loads(header)
        if not isinstance(description, dict) or description.pop("kind", None) != kind:
            raise AdapeftError(f"{path} holds another kind of artifact: expected a {kind}.")
        return {name: file.get_tensor(name) for name in file.keys()}, description  # noqa: SIM118


def artifact_kind(path: Path) -> str:
    """Return the kind of artifact in a file's header, or an empty string if it is not an artifact of adapeft.

    Raises:
        AdapeftError: there is no such file.
    """
    if not Path(path).is_file():
        raise AdapeftError(f"{path}: no such file; expected a subset or a delta.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY, "{}")
        description = loads(header)
    except (SafetensorError, OSError, ValueError):
        return ""
    return str(description.get("kind", "")) if isinstance(description, dict) else ""


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    if not Path(path).is_file():
        raise AdapeftError(f"{path}: no such file; expected {expected}.")
    with reading(f"{path} is not {expected}, or it is truncated", "Write it again."):
        yield


def _share(path: Path) -> None:
    """Set the usual permissions; files of mkstemp and safetensors are readable only by their owner."""
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""The keys of a config whose values are paths, URLs or names in a store or on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

SUBSET_SUFFIX = ".safetensors"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_JOB_FOLDER = re.compile(r".*/working_dir_files/_ray_pkg_[0-9a-f]+/")


def is_local(source: str) -> bool:
    """Return whether a data source is a file or folder rather than the name of a hub data set."""
    return is_path(source) and (source.lower().endswith(DATA_SUFFIXES) or exists(source))


def is_in_job_folder(path: str) -> bool:
    """Return whether ``path`` is in the working directory of a Ray job, which Ray unpacks on every machine."""
    return _JOB_FOLDER.match(path) is not None


def without_job_folder(path: str) -> str:
    """Return ``path`` without the folder into which Ray unpacked it."""
    return _JOB_FOLDER.sub("", path)


def exists(path: str) -> bool:
    """Return whether ``path`` is a file or folder on this machine."""
    return os.path.exists(os.path.expanduser(path))


def is_url(place: str) -> bool:
    """Return whether ``place`` is a URL of remote storage rather than a path."""
    return "://" in place


def has_password(text: str) -> bool:
    """Return whether ``text`` contains a URL with a password."""
    return re.search(r"://[^/@\s]*:[^/@\s]+@", text) is not None


def without_secrets(text: str) -> str:
    """Return ``text`` with the passwords and the queries, which may hold signatures, of its URLs left out."""
    text = re.sub(r"(://[^/@\s\"':]*):[^/@\s\"']+@", r"\1:…@", text)
    return re.sub(r"(://[^\s\"'?]+\?)[^\s\"']+", r"\1…", text)


def is_path(place: str) -> bool:
    return not is_url(place)


def is_name(place: str) -> bool:
    """Return whether ``place`` is the name of a subset in a store: not a path, a URL or an existing file."""
    return not ("/" in place or os.sep in place or place.endswith(SUBSET_SUFFIX) or os.path.isfile(place))


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def impossible(path: str) -> str | None:
    """Return the reason why the operating system rejects ``path``, such as its length; None for a valid path."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror
    except ValueError as error:  # a null byte
        return str(error)
    return None


PLACES: dict[str, Callable[[str], bool]] = {
    "model.name": exists,
    "data.train": is_local,
    "data.evaluation": is_local,
    "output": is_path,
    "select.statistics": is_path,
    "train.subset": lambda place: is_path(place) and not is_name(place),
}
"""Key → predicate of values that are paths."""

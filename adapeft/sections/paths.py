"""Where things are: the keys of a config that name a file, a folder, a store or a data set on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

SUBSET_SUFFIX = ".safetensors"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_JOB_FOLDER = re.compile(r".*/working_dir_files/_ray_pkg_[0-9a-f]+/")


def is_local(source: str) -> bool:
    """Whether a data source is a file or folder rather than the name of a hub data set."""
    return is_path(source) and (source.lower().endswith(DATA_SUFFIXES) or exists(source))


def is_in_job_folder(path: str) -> bool:
    """Whether ``path`` is among the files that a Ray job brought along, which Ray unpacks on every machine."""
    return _JOB_FOLDER.match(path) is not None


def without_job_folder(path: str) -> str:
    """``path`` as it was spelled before Ray unpacked it."""
    return _JOB_FOLDER.sub("", path)


def exists(path: str) -> bool:
    """Whether ``path`` is a file or folder here."""
    return os.path.exists(os.path.expanduser(path))


def is_url(place: str) -> bool:
    """Whether ``place`` is in storage rather than on a file system of this machine."""
    return "://" in place


def has_password(text: str) -> bool:
    """Whether there is a URL with a password in ``text``."""
    return re.search(r"://[^/@\s]*:[^/@\s]+@", text) is not None


def is_path(place: str) -> bool:
    """The contrary of ``is_url``."""
    return not is_url(place)


def is_name(place: str) -> bool:
    """Whether ``place`` can only be a name in a store: it looks like no path or URL, and no file has it."""
    return not ("/" in place or os.sep in place or place.endswith(SUBSET_SUFFIX) or os.path.isfile(place))


def absolute(path: str) -> str:
    """The same place from any folder."""
    return os.path.abspath(os.path.expanduser(path))


def impossible(path: str) -> str | None:
    """Why there can be no file of that path, and everything that asks for it would raise; None where there can."""
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
"""Key → whether what it says is a place on a file system."""

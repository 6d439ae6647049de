"""What a job takes along to a cluster: its config, and those files the config names that lie in a working directory.

Ray unpacks it on every machine and starts the job there. Nothing else of the working directory travels: no ``.env``, no
other run, no checkout.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapeft.config.config import Config
from adapeft.config.load import to_yaml
from adapeft.errors import AdapeftError
from adapeft.sections.paths import has_password

CONFIG = "config.yaml"
MOST_BYTES = 512 * 2**20
"""Ray passes a job's files through the memory of the head node, and takes no more than this."""


@dataclass(frozen=True)
class Package:
    """A config as the job will read it, and what has to be beside it.

    Attributes:
        config: paths are relative to the package where they are in ``files``, else absolute.
        files: file or folder here, by its path in the package.
        unseen: lines on what the cluster's machines have to have themselves, which nobody can check from here.
    """

    config: Config
    files: dict[str, Path]
    unseen: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Fills an empty folder, with links instead of copies."""
        (folder / CONFIG).write_text(to_yaml(self.config), encoding="utf-8")
        for name, source in self.files.items():
            target = folder / name
            # A file in a folder that travels as a whole is there already.
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)


def pack(config: Config, working_dir: Path, *, is_here: bool) -> Package:
    """Decides for every path of a config whether it travels or is on the cluster.

    Args:
        config: with paths as the user spelled them.
        working_dir: what lies in it travels.
        is_here: whether the cluster's head runs on this machine, so that what is missing here is missing there.

    Raises:
        AdapeftError: a path that the job could not find, a relative output for a cluster elsewhere, too many bytes, or
            a password in a URL.
    """
    _check_no_password(config)
    if not working_dir.is_dir():
        raise AdapeftError(f"--working-dir = {working_dir}: no such folder. Give the one that holds the run's files.")
    root = os.path.abspath(working_dir)
    spelled = config.paths()
    output = spelled.pop("output", None)
    paths: dict[str, str] = {}
    files: dict[str, Path] = {}
    unseen: list[str] = []
    if output is not None:
        paths["output"] = _output(output, is_here=is_here)
    for key, path in spelled.items():
        absolute = os.path.abspath(os.path.expanduser(path))
        inside = absolute.startswith(root + os.sep)
        if not os.path.exists(absolute) and (is_here or inside or not os.path.isabs(path)):
            raise AdapeftError(f"{key} = {path}: no such file or folder here ({absolute}), so it cannot travel.")
        if inside and key == "select.statistics":
            # Of another run only its measurements: checkpoints beside them can be large.
            files |= _measurements(os.path.relpath(absolute, root), Path(absolute))
        elif inside:
            files[os.path.relpath(absolute, root)] = Path(absolute)
        elif not is_here:
            unseen.append(f"{key} = {absolute} is not in the working directory: the cluster has to see it there")
        paths[key] = os.path.relpath(absolute, root) if inside else absolute
    model = config.model.name
    if "model.name" not in spelled and not is_here and model.startswith("/"):
        unseen.append(f"model.name = {model} is not on this machine: the cluster has to see it there")
    _check_size(files)
    return Package(config.with_paths(paths), dict(sorted(files.items(), key=lambda item: len(item[0]))), tuple(unseen))


def _output(path: str, *, is_here: bool) -> str:
    if not is_here and not os.path.isabs(path):
        raise AdapeftError(
            f"output = {path}: the cluster is on another machine, where a relative path would be in a temporary "
            "folder. Give an absolute path on storage that all its machines share: output=/…"
        )
    return os.path.abspath(os.path.expanduser(path))


def _measurements(name: str, run: Path) -> dict[str, Path]:
    from adapeft.measure.storage import ELEMENTS, OPTIONS, TABLE

    return {os.path.join(name, part): run / part for part in (TABLE, OPTIONS, ELEMENTS) if (run / part).exists()}


def _check_size(files: dict[str, Path]) -> None:
    sizes = {name: sum(part.stat().st_size for part in _all_files(path)) for name, path in files.items()}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise AdapeftError(
            f"{largest} has {sizes[largest] / 2**20:.0f} MiB of {total / 2**20:.0f} that would travel, and Ray takes "
            f"{MOST_BYTES // 2**20} at most. Put it on storage that the cluster's machines share, and name it there."
        )


def _all_files(path: Path) -> Iterable[Path]:
    return (part for part in path.rglob("*") if part.is_file()) if path.is_dir() else (path,)


def _check_no_password(config: Config) -> None:
    for line in to_yaml(config).splitlines():
        if has_password(line):
            raise AdapeftError(
                f"{line.partition(':')[0].strip()}: has a password in its URL, which everyone who sees the job could "
                "read. Give the cluster's machines their own credentials and leave it out."
            )

"""The files that a job sends to a cluster: its config, and the files in the working directory that the config names.

Ray unpacks them on every machine and starts the job there. Nothing else in the working directory is sent: no ``.env``,
no other run, no checkout.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapeft.config.config import Config
from adapeft.config.write import to_yaml
from adapeft.errors import AdapeftError
from adapeft.sections.paths import has_password

CONFIG = "config.yaml"
MOST_BYTES = 512 * 2**20
"""Ray passes a job's files through the memory of the head node and accepts no more than this."""


@dataclass(frozen=True)
class Package:
    """A config as the job will read it, and the files to send with it.

    Attributes:
        config: config whose paths are relative to the package if they are in ``files``, else absolute.
        files: path in the package → file or folder on this machine.
        unseen: notes on paths that must exist on the cluster's machines, which cannot be checked from here.
    """

    config: Config
    files: dict[str, Path]
    unseen: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Fill an empty folder, with links instead of copies."""
        (folder / CONFIG).write_text(to_yaml(self.config), encoding="utf-8")
        for name, source in self.files.items():
            target = folder / name
            # A file in a folder that is sent as a whole exists already.
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)


def pack(config: Config, working_dir: Path, *, is_here: bool) -> Package:
    """Decide for every path of a config whether it is sent or is already on the cluster.

    Args:
        config: config with paths as the user spelled them.
        working_dir: folder whose files are sent if the config names them.
        is_here: whether the cluster's head runs on this machine, so that a path missing here is missing there.

    Raises:
        AdapeftError: the job could not find a path, the output is relative and the cluster elsewhere, the files are too
            large, or a URL holds a password.
    """
    _check_no_password(config)
    if not working_dir.is_dir():
        raise AdapeftError(f"--working-dir = {working_dir}: no such folder. Give the folder of the run's input files.")
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
            raise AdapeftError(f"{key} = {path}: no such file or folder here ({absolute}), so it cannot be sent.")
        if inside and key == "select.statistics":
            # Of another run only its measurements are sent: checkpoints next to them can be large.
            files |= _measurements(os.path.relpath(absolute, root), Path(absolute))
        elif inside:
            files[os.path.relpath(absolute, root)] = Path(absolute)
        elif not is_here:
            unseen.append(f"{key} = {absolute} is not in the working directory, so it must exist on the cluster")
        paths[key] = os.path.relpath(absolute, root) if inside else absolute
    model = config.model.name
    if "model.name" not in spelled and not is_here and model.startswith("/"):
        unseen.append(f"model.name = {model} is not on this machine, so it must exist on the cluster")
    _check_size(files)
    return Package(config.with_paths(paths), dict(sorted(files.items(), key=lambda item: len(item[0]))), tuple(unseen))


def _output(path: str, *, is_here: bool) -> str:
    if not is_here and not os.path.isabs(path):
        raise AdapeftError(
            f"output = {path}: the cluster is on another machine, where a relative path would be in a temporary "
            "folder. Give an absolute path on storage that its machines share: output=/…"
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
            f"{largest}: {sizes[largest] / 2**20:.0f} MiB of the {total / 2**20:.0f} MiB to send, and Ray accepts at "
            f"most {MOST_BYTES // 2**20} MiB. Put it on storage that the cluster's machines share, and name it there."
        )


def _all_files(path: Path) -> Iterable[Path]:
    return (part for part in path.rglob("*") if part.is_file()) if path.is_dir() else (path,)


def _check_no_password(config: Config) -> None:
    for line in to_yaml(config).splitlines():
        if has_password(line):
            raise AdapeftError(
                f"{line.partition(':')[0].strip()}: the URL holds a password, which everyone who sees the job could "
                "read. Leave it out, and give the cluster's machines their own credentials."
            )

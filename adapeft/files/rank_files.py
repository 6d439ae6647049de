"""A folder with one file per rank, which appears only after all ranks have written."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_tensors, save_text, stored
from adapeft.ranks import Ranks

_NAME = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors")


def rank_path(folder: Path, rank: int, world_size: int) -> Path:
    return folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def rank_paths(folder: Path, remedy: str) -> list[Path]:
    """Return the files of all ranks that wrote ``folder``, in order of rank.

    Raises:
        AdapeftError: files are missing; the message ends with ``remedy``.
    """
    paths = sorted(path for path in folder.glob("*") if _NAME.fullmatch(path.name))
    expected = int(paths[0].stem.rpartition("-")[2]) if paths else 1
    if len(paths) != expected:
        raise AdapeftError(f"{folder}: {len(paths)} of {expected} shards are there. {remedy}")
    return paths


def save_on_ranks(
    folder: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write the tensors of each rank to its file in ``folder``, replacing an older folder. Collective.

    The folder is on the machine of rank 0; ranks on machines that do not see it send their files there.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    mark = _marked(partial, ranks)

    def place(rank: int) -> Path:
        return rank_path(partial, rank, ranks.world_size)

    if mark.exists():
        save_tensors(place(ranks.rank), kind, tensors, description)
        ranks.gather_files(None, place)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            path = Path(made, "mine")
            save_tensors(path, kind, tensors, description)
            ranks.gather_files(path, place)
    _wait(ranks)
    if ranks.rank == 0:
        mark.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        stored(folder, lambda: os.replace(partial, folder))
    _wait(ranks)


def save_one_by_one(
    folder: Path, kind: str, files: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Any]]], count: int
) -> None:
    """Write the files that ``count`` ranks would write, each with its tensors and description, from this process alone.

    Only the tensors of one file need memory at a time. Replaces an older folder.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, (tensors, description) in enumerate(files):
        save_tensors(rank_path(partial, number, count), kind, tensors, description)
    shutil.rmtree(folder, ignore_errors=True)
    stored(folder, lambda: os.replace(partial, folder))


def _marked(folder: Path, ranks: Ranks) -> Path:
    """Return a file that exists for the ranks that see the ``folder`` of rank 0, otherwise empty. Collective."""
    number = secrets.randbits(62)
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run, perhaps with more ranks
        save_text(folder / f".{number:x}", "")
    first = int(ranks.all_gather(torch.tensor([number]))[0])
    return folder / f".{first:x}"


def _wait(ranks: Ranks) -> None:
    """Wait for all ranks."""
    ranks.all_reduce(torch.zeros(1))

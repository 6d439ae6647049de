"""A folder with a file of every rank: there once all have written, and not at all before."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping
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
    """Where a rank's file is."""
    return folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def rank_paths(folder: Path, remedy: str) -> list[Path]:
    """The files of all ranks that wrote ``folder``, by rank.

    Raises:
        AdapeftError: some are missing; it ends with the ``remedy``.
    """
    paths = sorted(path for path in folder.glob("*") if _NAME.fullmatch(path.name))
    expected = int(paths[0].stem.rpartition("-")[2]) if paths else 1
    if len(paths) != expected:
        raise AdapeftError(f"{folder}: {len(paths)} of {expected} shards are there. {remedy}")
    return paths


def save_on_ranks(
    folder: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any], ranks: Ranks
) -> None:
    """Writes what each rank gives to its file of ``folder``, in the place of an older one. Collective.

    The folder is the one on the first rank's machine: ranks on machines that do not see it send their files there.
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


def _marked(folder: Path, ranks: Ranks) -> Path:
    """A file by which a rank sees whether it sees the first rank's ``folder``, which is empty otherwise. Collective."""
    number = secrets.randbits(62)
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed, perhaps one of more ranks
        save_text(folder / f".{number:x}", "")
    first = int(ranks.all_gather(torch.tensor([number]))[0])
    return folder / f".{first:x}"


def _wait(ranks: Ranks) -> None:
    """For all ranks."""
    ranks.all_reduce(torch.zeros(1))

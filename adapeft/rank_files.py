"""A folder with a file of every rank: there once all have written, and not at all before."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapeft.artifact import save_tensors, stored
from adapeft.errors import AdapeftError
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
    """Writes what each rank gives to its file of ``folder``, in the place of an older one. Collective."""
    partial = folder.with_name(f".{folder.name}.partial")
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed, perhaps one of more ranks
    _wait(ranks)
    save_tensors(rank_path(partial, ranks.rank, ranks.world_size), kind, tensors, description)
    _wait(ranks)
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        stored(folder, lambda: os.replace(partial, folder))
    _wait(ranks)


def _wait(ranks: Ranks) -> None:
    """For all ranks."""
    ranks.all_reduce(torch.zeros(1))

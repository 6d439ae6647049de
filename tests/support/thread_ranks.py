"""Ranks as threads of this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from adapeft.ranks import Ranks


class ThreadRanks:
    """One of ``world_size`` ranks; see ``adapeft.ranks.Ranks``."""

    def __init__(self, rank: int, world_size: int, gathered: list[Any], barrier: Barrier) -> None:
        self.rank, self.world_size = rank, world_size
        self._gathered, self._barrier = gathered, barrier

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._all(tensor.clone())).sum(0))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        assert tensor.ndim == 1, "the ranks of DeepSpeed gather nothing else"
        return self._all(tensor)

    def gather_files(self, mine: Path | None, place: Callable[[int], Path]) -> None:
        for rank, file in enumerate(self._all(mine)):
            if file is not None and self.rank == 0:
                shutil.copy(file, place(rank))
        self._barrier.wait()

    def _all(self, value: Any) -> list[Any]:
        self._gathered[self.rank] = value
        self._barrier.wait()
        found = list(self._gathered)
        self._barrier.wait()
        return found


def on_ranks(world_size: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """Run ``function`` on all ranks and return the results by rank."""
    gathered, barrier = [None] * world_size, Barrier(world_size, timeout=120)
    with ThreadPoolExecutor(world_size) as pool:
        return list(
            pool.map(function, [ThreadRanks(rank, world_size, gathered, barrier) for rank in range(world_size)])
        )

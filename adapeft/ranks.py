"""The collectives that measuring, choosing and saving need. A single process is world size 1, not a special case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The processes that share a model's statistics."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over the ranks in place and return it."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the 1-D tensors of all ranks in order of rank; lengths may differ."""
        ...

    def gather_files(self, mine: Path | None, place: Callable[[int], Path]) -> None:
        """Copy the file ``mine`` of each rank to ``place(rank)`` on the machine of rank 0; None: no file."""
        ...


class OneRank:
    """A single process."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def gather_files(self, mine: Path | None, place: Callable[[int], Path]) -> None:
        assert mine is None, "the only rank is on its own machine"

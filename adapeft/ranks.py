"""The collectives that measuring, choosing and saving need. One process is world size 1, not another code path."""

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
        """Sums ``tensor`` over the ranks in place and returns it."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The 1-D tensors of all ranks, by rank; lengths may differ."""
        ...

    def gather_files(self, mine: Path | None, place: Callable[[int], Path]) -> None:
        """Copies the file of each rank that gives one to ``place(its rank)`` on the first rank's machine."""
        ...


class OneRank:
    """A single process."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See ``Ranks.all_reduce``."""
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See ``Ranks.all_gather``."""
        return [tensor]

    def gather_files(self, mine: Path | None, place: Callable[[int], Path]) -> None:
        """See ``Ranks.gather_files``."""
        assert mine is None, "the only rank is on its own machine"

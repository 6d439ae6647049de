"""What a measurement sees of a model: its candidates themselves, or windows on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from adapeft.measure.groups import Groups
from adapeft.measure.low_rank.windows import SeenShards, Windows
from adapeft.measure.shards.shards import Shards


class Seen:
    """Parameters whose gradients are measured.

    Attributes:
        names: their names in the model.
    """

    def __init__(self, groups: Groups, windows: Windows | None) -> None:
        self._candidates = tuple(info.name for info in groups.parameters)
        self._windows = windows
        self.names = windows.names if windows else self._candidates

    def shards(self, shards: Shards) -> Shards:
        """Return the shards of the candidates, given those of ``names``."""
        return SeenShards(shards, self._windows, self._candidates) if self._windows else shards


@contextmanager
def seen(model: nn.Module, groups: Groups, rank: int | None, seed: int) -> Iterator[Seen]:
    """Prepare ``model`` for measuring; on exit, restore it.

    Args:
        rank: rank of the windows; None for the candidates themselves.
        seed: random seed of the windows.

    Raises:
        AdapeftError: no candidate is larger than the windows.
    """
    windows = Windows(model, groups, rank, seed) if rank else None
    try:
        yield Seen(groups, windows)
    finally:
        if windows:
            windows.remove()

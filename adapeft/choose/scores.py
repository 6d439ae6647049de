"""Scores of single elements, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapeft.measure.statistics import ElementShard, Value


class Scores(Sequence[Tensor]):
    """The scores of each shard's elements, each [slice.length].

    Those of a factored shard are computed whenever they are read, so that only one shard's are in memory.
    """

    def __init__(self, elements: Sequence[ElementShard], score: Value) -> None:
        self._elements, self._score = elements, score
        self._kept = {index: score(shard.columns) for index, shard in enumerate(elements) if not shard.is_factored}

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, index: Any) -> Any:
        """Return the scores of the shard at ``index``, which is an integer."""
        if index >= len(self):
            raise IndexError(index)
        return self._kept[index] if index in self._kept else self._score(self._elements[index].columns)

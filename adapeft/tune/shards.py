"""Leaves of dense parts as ranges of the tensors that an optimizer updates. In one process a leaf is one range."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from adapeft.parts.rule import LeafShard, LeafShards
from adapeft.ranks import OneRank, Ranks
from adapeft.tune.attachment import Attachment


class Range(NamedTuple):
    """``flat[offset : offset + length]`` is ``leaf.flatten()[start : start + length]``; ``flat`` is 1-D, or a leaf."""

    flat: Tensor
    offset: int
    start: int
    length: int


def leaf_shards(
    attachment: Attachment, range_of: Callable[[nn.Parameter], Range | None], ranks: Ranks, publish: Callable[[], None]
) -> LeafShards:
    """Return the shards of all leaves.

    Args:
        range_of: function from a leaf to the range that this process holds, or None.
    """
    shards = []
    flats: dict[int, list[tuple[int, LeafShard]]] = {}
    position = 0
    for index, name in enumerate(attachment.dense):
        for leaf, tensor in attachment.pieces(name).items():
            found = range_of(tensor)
            if found is None or not found.length:
                continue
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            values = found.flat.detach().view(-1).narrow(0, found.offset, found.length)
            shard = LeafShard(leaf, name, shape, index, position + found.start, found.start, values)
            shards.append(shard)
            flats.setdefault(id(found.flat), []).append((found.offset, shard))
        position += attachment.subset.parts[name].count
    return LeafShards(tuple(shards), len(attachment.dense), ranks, flats, publish)


def whole_leaves(attachment: Attachment) -> LeafShards:
    """Return the shards of one process that trains without ZeRO."""
    return leaf_shards(attachment, whole, OneRank(), lambda: None)


def whole(leaf: nn.Parameter) -> Range:
    """Return the range of a leaf that its optimizer updates directly."""
    return Range(leaf, 0, 0, leaf.numel())

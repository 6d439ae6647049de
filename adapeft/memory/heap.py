"""What glibc's allocator holds on a CPU while a step allocates and frees, holes in its heap included.

PyTorch allocates blocks that are aligned to ``ALIGNMENT``. For one, glibc before 2.38 needs a hole larger than the
block by the alignment, takes the smallest of these or extends the heap, and gives the two ends back. So a hole that a
block has left may be too small for the next block of its size. Blocks of at least ``threshold`` bytes for which there
is no hole are mapped by themselves and returned when freed; the end of the heap is returned once it is large.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

LARGEST_THRESHOLD = 2**25
"""Size up to which glibc learns to keep freed blocks in its heap, if ``threshold`` is not set."""
RETURNED = 2**22
"""Size from which the workers of ZeRO-3 on a CPU return freed blocks, see ``cluster.launch.resources``."""
TRIM = 2**26
"""Free bytes at the end of the heap that are returned."""
ALIGNMENT = 64
_HEADER = 16
_LEAST = 32
"""Bytes of the smallest block."""
_STEPS = 3
"""Number of identical steps after which the heap hardly grows."""


class Held(NamedTuple):
    """The most bytes that glibc holds.

    Attributes:
        most: with blocks that are mapped by themselves.
        in_heap: in its heap, which it keeps when the blocks are freed.
    """

    most: int
    in_heap: int


def held_bytes(sizes: list[int], events: Iterable[tuple[int, int]], threshold: int = LARGEST_THRESHOLD) -> Held:
    """Return the most bytes that glibc holds over several steps.

    Args:
        sizes: bytes of each block.
        events: block and 1 or -1, where a step allocates or frees it; blocks that it leaves are freed at its end.
        threshold: bytes from which blocks are mapped by themselves.
    """
    heap = _Heap(threshold)
    for _ in range(_STEPS):
        for block, sign in events:
            if sign > 0:
                heap.allocate(block, sizes[block])
            else:
                heap.free(block)
        for block in list(heap.blocks):
            heap.free(block)
    return Held(heap.most, heap.longest)


class _Heap:
    """Addresses of blocks and holes; the heap is the range from 0 to ``end``."""

    def __init__(self, threshold: int) -> None:
        self.blocks: dict[int, tuple[int, int]] = {}
        self.most = self.longest = 0
        self._threshold = threshold
        self._end = self._mapped = 0
        self._holes: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}
        self._starts: dict[int, int] = {}

    def allocate(self, block: int, size: int) -> None:
        needed = -(-max(size + _HEADER // 2, _LEAST) // _HEADER) * _HEADER
        padded = needed + ALIGNMENT + _LEAST
        place = bisect_left(self._holes, (padded, 0))
        if place < len(self._holes):
            start = self._holes[place][1]
            hole = self._take(start)
        elif needed >= self._threshold:
            self.blocks[block] = (-1, needed)
            self._mapped += needed
            self.most = max(self.most, self._end + self._mapped)
            return
        else:
            start = self._starts.get(self._end, self._end)
            hole = self._take(start) if start < self._end else 0
            hole = max(hole, needed)
            self._end = max(self._end, start + hole)
        self._add(start + needed, hole - needed)
        self.blocks[block] = (start, needed)
        self.longest = max(self.longest, self._end)
        self.most = max(self.most, self._end + self._mapped)

    def free(self, block: int) -> None:
        start, size = self.blocks.pop(block)
        if start < 0:
            self._mapped -= size
            return
        if start in self._starts:
            before = self._starts[start]
            size += self._take(before)
            start = before
        if start + size in self._sizes:
            size += self._take(start + size)
        if start + size == self._end and size >= TRIM:
            self._end = start
        else:
            self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        if size > 0:
            insort(self._holes, (size, start))
            self._sizes[start], self._starts[start + size] = size, start

    def _take(self, start: int) -> int:
        size = self._sizes.pop(start)
        del self._starts[start + size]
        self._holes.pop(bisect_left(self._holes, (size, start)))
        return size

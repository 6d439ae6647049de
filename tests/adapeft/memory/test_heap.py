"""What glibc holds, against what can be counted by hand and against glibc itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from adapeft.memory.heap import LARGEST_THRESHOLD, RETURNED, TRIM, held_bytes

MIB = 2**20
SLACK = 4096
"""Headers and the alignment of a few blocks."""


def test_nested_blocks_leave_no_holes():
    sizes = [3 * MIB, 2 * MIB, MIB]
    events = [(0, 1), (1, 1), (2, 1), (2, -1), (1, -1), (0, -1)]
    assert 6 * MIB <= held_bytes(sizes, events).most <= 6 * MIB + SLACK


def test_a_hole_is_used_by_a_smaller_block_and_not_by_a_larger_one():
    def held(size):
        return held_bytes([4 * MIB, MIB, size], [(0, 1), (1, 1), (0, -1), (2, 1)]).most

    assert 5 * MIB <= held(3 * MIB) <= 5 * MIB + SLACK
    assert 10 * MIB <= held(5 * MIB) <= 10 * MIB + SLACK
    # Neither by one of the same size: an aligned block needs a larger hole.
    assert 9 * MIB <= held(4 * MIB) <= 9 * MIB + SLACK


def test_neighbouring_holes_are_one():
    sizes = [2 * MIB, 2 * MIB, MIB, 3 * MIB]
    assert held_bytes(sizes, [(0, 1), (1, 1), (2, 1), (0, -1), (1, -1), (3, 1)]).most <= 5 * MIB + SLACK


def test_large_blocks_are_returned():
    sizes = [RETURNED, MIB, RETURNED]
    events = [(0, 1), (1, 1), (0, -1), (2, 1)]
    assert held_bytes(sizes, events, RETURNED).most <= RETURNED + MIB + SLACK
    assert held_bytes(sizes, events, LARGEST_THRESHOLD).most >= 2 * RETURNED + MIB


def test_what_stays_in_the_heap_is_without_what_is_mapped():
    sizes, events = [RETURNED, MIB, RETURNED], [(0, 1), (1, 1), (2, 1), (0, -1)]
    assert MIB <= held_bytes(sizes, events, RETURNED).in_heap <= MIB + SLACK
    held = held_bytes(sizes, events, LARGEST_THRESHOLD)
    assert held.in_heap == held.most >= 2 * RETURNED + MIB


def test_the_end_of_the_heap_is_returned_once_it_is_large():
    many = [MIB] * (TRIM // MIB + 1)
    first = [(block, 1) for block in range(len(many))]
    last = [(block, -1) for block in range(len(many))]
    mapped = [(len(many), 1)]
    assert held_bytes([*many, LARGEST_THRESHOLD], [*first, *last, *mapped]).most <= sum(many) + MIB


GLIBC = """
import json, resource, sys, torch
sizes, events = json.load(sys.stdin)
def rss():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
most, start = 0, rss()
for _ in range(3):
    blocks = {}
    for block, sign in events:
        if sign > 0:
            blocks[block] = torch.ones(sizes[block], dtype=torch.uint8)
        else:
            del blocks[block]
        most = max(most, rss())
print(most - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("threshold", [RETURNED, LARGEST_THRESHOLD])
def test_glibc_holds_as_much(threshold):
    """Blocks of the sizes of a small transformer's layers, the first half of them freed by the layer itself."""
    layer = [3 * MIB, 3 * MIB, 6 * MIB, 3 * MIB, 12 * MIB, 12 * MIB]
    sizes = [size + 64 * number for number in range(8) for size in layer]
    events = []
    for number in range(8):
        blocks = range(6 * number, 6 * number + 6)
        events += [(block, 1) for block in blocks] + [(block, -1) for block in blocks[:3]]
    for number in reversed(range(8)):
        events += [(block, -1) for block in range(6 * number + 3, 6 * number + 6)]
    environment = os.environ | {
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
        "MALLOC_MMAP_THRESHOLD_": str(threshold),
        "MALLOC_TRIM_THRESHOLD_": str(TRIM),
    }
    command = [sys.executable, "-c", GLIBC]
    done = subprocess.run(
        command, input=json.dumps([sizes, events]), env=environment, capture_output=True, text=True, check=True
    )
    assert held_bytes(sizes, events, threshold).most == pytest.approx(int(done.stdout), rel=0.15)

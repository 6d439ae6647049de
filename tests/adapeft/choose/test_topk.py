"""Exact top-k of divided scores against a sort."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapeft.choose import topk
from adapeft.choose.topk import top_k
from tests.oracles.measuring import top_k_by_sort

DENORMAL = 1e-45


def chosen(scores, k, cuts=()):
    """Return the global positions chosen by one process from scores divided at ``cuts``."""
    pieces, positions = divide(scores, cuts)
    picks = top_k(pieces, positions, k, lambda tensor: tensor)
    return [position + int(i) for position, pick in zip(positions, picks, strict=True) for i in pick]


def divide(scores, cuts):
    borders = sorted({0, *(min(cut, len(scores)) for cut in cuts)})
    return [scores[a:b] for a, b in pairwise([*borders, len(scores)])], borders


def chosen_by_ranks(scores, k, owners):
    """Return the same, chosen by threads that sum at a barrier; rank ``owners[i]`` holds piece i."""
    world_size = max(owners) + 1
    pieces, positions = divide(scores, [len(scores) * i // len(owners) for i in range(1, len(owners))])
    owners = owners[: len(pieces)]
    barrier, shared, found = threading.Barrier(world_size, timeout=120), [None] * world_size, {}

    def rank_main(rank):
        def all_reduce(tensor):
            shared[rank] = tensor.clone()
            barrier.wait()
            total = sum(shared)
            barrier.wait()
            return tensor.copy_(total)

        mine = [i for i, owner in enumerate(owners) if owner == rank]
        picks = top_k([pieces[i] for i in mine], [positions[i] for i in mine], k, all_reduce)
        for i, pick in zip(mine, picks, strict=True):
            found[i] = [positions[i] + int(p) for p in pick]

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [position for i in range(len(pieces)) for position in found[i]]


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 5.0, 1.0, 5.0, 1.0], 3, [0, 1, 3]),
        ([2.0, 2.0, 2.0, 2.0], 2, [0, 1]),
        ([0.0, 0.0], 1, []),
        ([-1.0, -0.0, 0.0, 4.0], 3, [3]),
        ([1.0, 2.0], 0, []),
        ([1.0, 2.0], 2, [0, 1]),
        ([1.0, 2.0], 9, [0, 1]),
        ([7.0], 1, [0]),
        ([], 1, []),
        ([DENORMAL, 0.0, 2 * DENORMAL, DENORMAL], 2, [0, 2]),
        ([float("inf"), 1e38, float("nan"), 1.0], 2, [0, 1]),
        ([1.0, 1.0 + 2**-23, 1.0], 1, [1]),
    ],
)
def test_cases(scores, k, expected):
    assert chosen(torch.tensor(scores, dtype=torch.float32), k) == expected


number = st.one_of(
    st.sampled_from([0.0, -1.0, 1.0, 2.0, DENORMAL]), st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@settings(deadline=None)
@given(st.lists(number, max_size=40), st.integers(0, 45), st.lists(st.integers(0, 40), max_size=4))
def test_is_the_sorts_for_any_pieces(scores, k, cuts):
    scores = torch.tensor(scores, dtype=torch.float32)
    assert chosen(scores, k, cuts) == top_k_by_sort(scores, k)


@pytest.mark.parametrize("k", [1, 9, 57, 150])
def test_runs_of_a_piece_change_nothing(k, monkeypatch):
    # Few distinct values, so scores of several runs tie for the last place.
    scores = torch.randint(-2, 6, (200,), generator=torch.Generator().manual_seed(0)).float()
    monkeypatch.setattr(topk, "_RUN", 7)
    largest = []
    keys_of = topk._descending_key
    monkeypatch.setattr(topk, "_descending_key", lambda run: largest.append(len(run)) or keys_of(run))
    assert chosen(scores, k, [50]) == top_k_by_sort(scores, k)
    assert max(largest) == 7


@pytest.mark.parametrize("owners", [[0], [0, 1], [1, 0], [0, 1, 0, 1], [2, 0, 0, 1, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("k", [1, 57, 200])
def test_is_the_same_for_any_world_size(owners, k):
    generator = torch.Generator().manual_seed(0)
    # Few distinct values, so scores on several ranks tie for the last place.
    scores = torch.randint(-2, 6, (200,), generator=generator).float()
    assert chosen_by_ranks(scores, k, owners) == top_k_by_sort(scores, k)


def test_a_rank_may_hold_nothing():
    scores = torch.arange(1.0, 9.0)
    assert chosen_by_ranks(scores, 3, [0, 2]) == [5, 6, 7]


def test_positions_beyond_32_bits():
    high = 2**40
    picks = top_k([torch.ones(3), torch.ones(3)], [high, 5], 4, lambda tensor: tensor)
    assert [pick.tolist() for pick in picks] == [[0], [0, 1, 2]]


class Work(TorchDispatchMode):
    """Counter of the elements that operations write."""

    def __init__(self):
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.written += sum(value.numel() for value in tree_leaves(result) if isinstance(value, torch.Tensor))
        return result


@pytest.mark.parametrize("ties", [False, True])
def test_the_work_grows_with_the_scores_and_not_with_the_pieces(ties):
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    scores = scores.round() if ties else scores
    written = []
    for num_pieces in (1, 400):
        pieces, positions = divide(scores, [len(scores) * i // num_pieces for i in range(1, num_pieces)])
        with Work() as work:
            picks = top_k(pieces, positions, 1000, lambda tensor: tensor)
        assert sum(map(len, picks)) == 1000
        written.append(work.written)
    assert written[1] < 1.01 * written[0], "a histogram of 65,536 counts for each piece was 100 times the work"


def test_only_ties_for_the_last_place_take_a_second_search():
    def num_reductions(k):
        seen = []
        top_k([torch.tensor([3.0, 1.0, 1.0, 2.0])], [0], k, lambda tensor: seen.append(tensor.numel()) or tensor)
        return len(seen)

    assert [num_reductions(k) for k in (1, 2, 3, 4)] == [3, 3, 6, 3]

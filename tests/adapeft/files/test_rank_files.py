"""A folder with one file per rank, on machines with and without a shared file system."""

from __future__ import annotations

import pytest
import torch

from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_tensors
from adapeft.files.rank_files import rank_path, rank_paths, save_on_ranks
from tests.support.thread_ranks import on_ranks

MACHINES = [(0, 0, 0), (0, 1, 1), (0, 1, 0)]
"""Machine of each of three ranks."""


def save(folder, machines, number=0.0):
    """Write the number of each of three ranks into the folder on its machine."""

    def write(ranks):
        mine = folder / f"machine-{machines[ranks.rank]}" / "made"
        save_on_ranks(mine, "test", {"a": torch.tensor([number + ranks.rank])}, {"rank": ranks.rank}, ranks)

    on_ranks(3, write)


def read(folder):
    files = [load_tensors(path, "test") for path in rank_paths(folder / "machine-0" / "made", "")]
    return [(float(tensors["a"]), description["rank"]) for tensors, description in files]


@pytest.mark.parametrize("machines", MACHINES)
def test_all_files_are_on_the_first_ranks_machine(tmp_path, machines):
    save(tmp_path, machines)
    assert read(tmp_path) == [(0.0, 0), (1.0, 1), (2.0, 2)]
    save(tmp_path, machines, 10.0)
    assert read(tmp_path) == [(10.0, 0), (11.0, 1), (12.0, 2)]
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [f"machine-0/made/rank-{rank:05d}-of-00003.safetensors" for rank in range(3)]


def test_what_killed_ranks_left_is_in_nobodys_way(tmp_path):
    """A machine that had the first rank when it was killed keeps its own half-written folder."""
    for machine in (0, 1):
        left = tmp_path / f"machine-{machine}" / ".made.partial"
        left.mkdir(parents=True)
        rank_path(left, 4, 5).write_text("of more ranks")
        (left / ".1234").touch()
    save(tmp_path, (0, 1, 1))
    assert read(tmp_path) == [(0.0, 0), (1.0, 1), (2.0, 2)]


def test_a_file_that_is_missing(tmp_path):
    save(tmp_path, (0, 0, 0))
    folder = tmp_path / "machine-0" / "made"
    rank_path(folder, 1, 3).unlink()
    with pytest.raises(AdapeftError, match="2 of 3 shards are there"):
        rank_paths(folder, "Measure again.")

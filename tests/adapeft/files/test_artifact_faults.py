"""A killed process, a full disk and a transient error leave existing files whole and raise a helpful message."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import time

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from adapeft.errors import AdapeftError
from adapeft.files import artifact
from adapeft.files.artifact import load_table, load_tensors, new_folder, save_json, save_table, save_tensors
from adapeft.files.rank_files import rank_paths, save_on_ranks
from adapeft.ranks import OneRank

# Keep tensors below the size at which torch divides work among threads, which a fork does not copy.
FORK = multiprocessing.get_context("fork")
WRITERS = {
    "json": lambda path, size: save_json(path, {"a": "x" * size}),
    "table": lambda path, size: save_table(path, pa.table({"a": torch.rand(size).numpy()})),
    "tensors": lambda path, size: save_tensors(path, "test", {"a": torch.ones(size)}, {}),
}


def save_for_ever(folder):
    step = 0
    while True:
        step += 1
        save_on_ranks(folder / f"step-{step}", "test", {"a": torch.full((20_000,), step)}, {"step": step}, OneRank())
        shutil.rmtree(folder / f"step-{step - 1}", ignore_errors=True)
        save_tensors(folder / "file", "test", {"a": torch.full((20_000,), step)}, {"step": step})


@pytest.mark.parametrize("seconds", [0.1, 0.23])
def test_a_process_killed_while_saving(tmp_path, seconds):
    process = FORK.Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "file").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -9
    newest = max(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
    for path in (tmp_path / "file", *rank_paths(tmp_path / f"step-{newest}", "")):
        tensors, description = load_tensors(path, "test")
        assert torch.equal(tensors["a"], torch.full((20_000,), description["step"]))
    # Half-written files do not block the next save.
    following = tmp_path / f"step-{newest + 1}"
    save_on_ranks(following, "test", {"a": torch.ones(1)}, {}, OneRank())
    assert load_tensors(rank_paths(following, "")[0], "test")[0].keys() == {"a"}
    assert not list(tmp_path.glob(".step-*"))


def overflow(write, path, said):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        write(path, 20_000)
    except AdapeftError as error:
        said.send(str(error))
    said.send("nothing raised")


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_finds_no_room(tmp_path, name):
    path, (said, sayer) = tmp_path / "file", FORK.Pipe(duplex=False)
    WRITERS[name](path, 10)
    before = path.read_bytes()
    process = FORK.Process(target=overflow, args=(WRITERS[name], path, sayer))
    process.start()
    message = said.recv()
    process.join()
    assert message.startswith(f"{path}: cannot be written ("), message
    assert "Free space there" in message
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def failing(monkeypatch):
    """Return a function that makes ``times`` renames fail and returns the list of waits in between, in seconds."""
    waits, replace = [], os.replace

    def fail(number, times):
        def rename(*places):
            nonlocal times
            times -= 1
            if times >= 0:
                raise OSError(number, os.strerror(number))
            replace(*places)

        monkeypatch.setattr(artifact.os, "replace", rename)
        monkeypatch.setattr(artifact.time, "sleep", waits.append)
        return waits

    return fail


def test_an_error_that_passes(failing, tmp_path):
    waits = failing(errno.EIO, times=2)
    save_table(tmp_path / "file", pa.table({"a": [1]}))
    assert load_table(tmp_path / "file")["a"].to_pylist() == [1]
    assert len(waits) == 2
    waits.clear()
    failing(errno.ESTALE, times=1)
    save_on_ranks(tmp_path / "folder", "test", {"a": torch.ones(1)}, {}, OneRank())
    assert load_tensors(rank_paths(tmp_path / "folder", "")[0], "test")[0]["a"] == 1
    assert len(waits) == 1


def test_an_error_that_stays(failing, tmp_path):
    save_json(tmp_path / "file", {"a": 1})
    waits = failing(errno.EIO, times=99)
    with pytest.raises(AdapeftError, match=r"file: cannot be written \(.*Input/output error.*file there is unchanged"):
        save_json(tmp_path / "file", {"a": 2})
    assert len(waits) == 3
    assert (tmp_path / "file").read_text() == '{\n  "a": 1\n}\n'


def test_a_full_disk_is_not_waited_for(failing, tmp_path):
    waits = failing(errno.ENOSPC, times=99)
    with pytest.raises(AdapeftError, match=r"file: cannot be written \(.*No space left on device.*Free space there"):
        save_tensors(tmp_path / "file", "test", {"a": torch.ones(1)}, {})
    assert waits == []
    assert os.listdir(tmp_path) == []


def test_a_folder_that_finds_no_room(tmp_path):
    def fill(folder):
        save_file({"a": torch.ones(1)}, folder / "first")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(AdapeftError, match=r"out: cannot be written \(.*No space left on device"),
        new_folder(tmp_path / "out") as temporary,
    ):
        fill(temporary)
    assert os.listdir(tmp_path) == []

"""Tests of a store with concurrent writers, writers killed halfway, and foreign entries."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import fsspec
import pytest

from adapeft.errors import AdapeftError
from adapeft.subset.entry import Summary
from adapeft.subset.store import HALF_WRITTEN, SubsetStore
from tests.support.processes import FORKS


@pytest.fixture(params=["folder", "memory"])
def url(request, tmp_path, monkeypatch):
    """Return the URL of an unused store: a folder, or a file system that behaves like a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    yield "memory://bucket/subsets"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def store(url):
    return SubsetStore(url)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path, 1)


def write(folder: Path, number: int) -> Path:
    """Write a file whose content depends on the number."""
    path = folder / f"{number}.bin"
    path.write_bytes(bytes([number]) * 100_000)
    return path


def damage(store: SubsetStore, name: str, content: bytes) -> None:
    """Overwrite a file of the store."""
    store._files.pipe_file(store._path(name), content)


def names(store: SubsetStore) -> list[str]:
    return [entry.name for entry in store.entries()[0]]


def test_comes_back(store, url, file):
    summary = Summary(base="bert", method="adapeft", count=3, metric="f1", after={"f1": 0.5, "loss": math.inf})
    assert store.entries() == ([], {})
    added = store.add("cola-0.5", file, summary)
    again = SubsetStore(url)
    assert again.entries() == ([added], {})
    assert again.get("cola-0.5").summary == summary
    for _ in range(2):  # from the store, then from the cache
        assert again.fetch(again.get("cola-0.5")).read_bytes() == file.read_bytes()


def test_a_name_is_given_once(store, url, tmp_path, file, monkeypatch):
    store.add("mine", file, Summary(count=1))
    with pytest.raises(AdapeftError, match="'mine' is taken in the store"):
        store.add("mine", write(tmp_path, 2), Summary(count=2))
    assert store.get("mine").summary.count == 1

    # The name is free when the writer checks, and taken once the writer has written its file.
    late, create = SubsetStore(url), SubsetStore._create

    def overtaken(entry):
        store.add("theirs", file, Summary(count=1))
        return create(late, entry)

    monkeypatch.setattr(late, "_create", overtaken)
    with pytest.raises(AdapeftError, match="'theirs' is taken in the store"):
        late.add("theirs", write(tmp_path, 2), Summary(count=2))
    assert store.fetch(store.get("theirs")).read_bytes() == file.read_bytes()
    assert len(store._sizes()) == 4, "the loser takes its file away again"


def test_a_put_that_the_client_repeats(file, monkeypatch):
    """The first put succeeds but its answer is lost; the second is refused because of the first."""
    store = SubsetStore("memory://repeated")
    put = store._files.pipe_file

    def twice(path, content, **options):
        put(path, content, **options)
        put(path, content, **options)

    monkeypatch.setattr(store._files, "pipe_file", twice)
    store.add("name", file, Summary(count=1))
    assert names(store) == ["name"]
    fsspec.filesystem("memory").rm("/repeated", recursive=True)


def test_removing(store, file):
    store.add("one", file, Summary(count=1))
    store.add("two", file, Summary(count=1))
    store.remove("one")
    assert names(store) == ["two"]
    assert len(store._sizes()) == 2
    with pytest.raises(AdapeftError, match="'one': no such subset in the store"):
        store.remove("one")
    store.add("one", file, Summary(count=2))
    assert store.get("one").summary.count == 2


def test_an_unknown_name(store, file):
    store.add("cola-rows", file, Summary(count=1))
    with pytest.raises(AdapeftError, match=r"'cola-row': no such subset .* Did you mean 'cola-rows'"):
        store.get("cola-row")


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", "a@b", ".hidden", "-x", "a b", "x.safetensors", "a" * 101])
def test_names_that_are_none(tmp_path, file, name):
    store = SubsetStore(str(tmp_path / "store"))
    for action in (
        lambda: store.add(name, file, Summary(count=1)),
        lambda: store.get(name),
        lambda: store.remove(name),
    ):
        with pytest.raises(AdapeftError, match="is not a valid name for a subset"):
            action()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "name.json is not an entry, or is truncated"),
        (b'{"name": "name", "tok', "name.json is not an entry, or is truncated"),
        (b'{"name": "name"}', "name.json is not an entry, or is truncated"),
        ("other", "name.json is the entry of 'other'"),
        ("elsewhere", "name.json is not an entry, or is truncated"),
    ],
)
def test_entries_that_are_none(store, file, content, said):
    added = store.add("name", file, Summary(count=1))
    store.add("whole", file, Summary(count=1))
    if isinstance(content, str):  # of another name, or a token that leads out of the store
        key, value = ("name", content) if content == "other" else ("token", "../" * 10 + "xx")
        content = json.dumps({**json.loads(added.model_dump_json()), key: value}).encode()
    damage(store, "name.json", content)
    entries, broken = store.entries()
    assert [entry.name for entry in entries] == ["whole"]
    assert said in broken["name"]
    with pytest.raises(AdapeftError, match=f"'name' is damaged.*{said}"):
        store.get("name")
    with pytest.raises(AdapeftError, match="'name' is taken"):
        store.add("name", file, Summary(count=1))
    store.remove("name")
    store.add("name", file, Summary(count=1))
    assert names(store) == ["name", "whole"]


def test_files_that_are_not_what_was_added(store, file):
    entry = store.add("name", file, Summary(count=1))
    damage(store, entry.file, file.read_bytes()[:-1])
    assert "has 99999 bytes, not 100000" in store.entries()[1]["name"]
    with pytest.raises(AdapeftError, match=r"'name' is damaged .*has 99999 bytes, not 100000"):
        store.fetch(entry)
    damage(store, entry.file, bytes(100_000))
    with pytest.raises(AdapeftError, match="is not the file that was added"):
        store.fetch(entry)
    store._files.rm_file(store._path(entry.file))
    assert "is missing" in store.entries()[1]["name"]
    with pytest.raises(AdapeftError, match="is missing"):
        store.fetch(entry)
    store.remove("name")
    assert store.entries() == ([], {})


def test_a_damaged_cache_is_not_trusted(file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = SubsetStore("memory://cached")
    entry = store.add("name", file, Summary(count=1))
    kept = store.fetch(entry)
    kept.write_bytes(b"something else")
    assert store.fetch(entry).read_bytes() == file.read_bytes()
    fsspec.filesystem("memory").rm("/cached", recursive=True)


def test_where_a_store_cannot_be(tmp_path, file):
    with pytest.raises(AdapeftError, match="store = nowhere://x: Protocol not known"):
        SubsetStore("nowhere://x")
    with pytest.raises(AdapeftError, match=r"atomically refuse a name that is taken\. Use a folder or a bucket"):
        SubsetStore("simplecache::memory://bucket").add("name", file, Summary(count=1))
    with pytest.raises(AdapeftError, match=r"store = .*1\.bin: .*Check the URL"):
        SubsetStore(str(file)).add("name", file, Summary(count=1))


def in_another_process(function, *arguments):
    """Run the function in a child process that shares only the disk."""
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    return process


def _add_killed(url: str, file: Path) -> None:
    store = SubsetStore(url)
    os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.add("name", file, Summary(count=1))


def test_a_writer_killed_half_way(tmp_path, file):
    store = SubsetStore(str(tmp_path / "store"))
    process = in_another_process(_add_killed, store.url, file)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = set((tmp_path / "store").iterdir())
    assert len(left) == 2, "the subset, and the entry under the name of its writer"
    (tmp_path / "store" / "name@home.safetensors").write_bytes(b"somebody else's")
    assert store.entries() == ([], {"name": HALF_WRITTEN})
    with pytest.raises(AdapeftError, match="no such subset"):
        store.get("name")

    # Its writer may still be active, but the name is free.
    with pytest.raises(AdapeftError, match="half written, and its writer may still be active"):
        store.remove("name")
    store.add("name", file, Summary(count=2))
    assert store.entries() == ([store.get("name")], {})
    store.remove("name")
    assert left < set((tmp_path / "store").iterdir())

    for path in (tmp_path / "store").iterdir():
        os.utime(path, times=(time.time() - 7200,) * 2)
    store.remove("name")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["name@home.safetensors"]


_NUM_NAMES = 20


def _add_all(url: str, folder: Path, number: int, start, results) -> None:
    store = SubsetStore(url)
    path = write(folder, number)
    start.wait()
    won = []
    for index in range(_NUM_NAMES):
        try:
            store.add(f"name-{index}", path, Summary(count=number))
            won.append(index)
        except AdapeftError as error:
            if "is taken" not in str(error):
                raise
    results.put((number, won))


def _read_all(url: str, start, done, results) -> None:
    store = SubsetStore(url)
    start.wait()
    problems, seen = [], 0
    while not done.is_set():
        entries, broken = store.entries()
        problems += [reason for reason in broken.values() if reason != HALF_WRITTEN]
        for entry in entries[-3:]:
            seen += 1
            if set(store.fetch(entry).read_bytes()) != {entry.summary.count}:
                problems.append(f"{entry.name} is a mixture")
    results.put((problems, seen))


def test_many_writers_of_the_same_names(tmp_path):
    """One writer wins each name, and a reader always sees whole entries."""
    store = SubsetStore(str(tmp_path / "store"))
    start, done, results, seen = FORKS.Barrier(5), FORKS.Event(), FORKS.Queue(), FORKS.Queue()
    writers = [in_another_process(_add_all, store.url, tmp_path, n, start, results) for n in range(1, 5)]
    reader = in_another_process(_read_all, store.url, start, done, seen)
    won = dict(results.get(timeout=900) for _ in writers)
    done.set()
    problems, num_seen = seen.get(timeout=900)
    for process in (*writers, reader):
        process.join()
        assert process.exitcode == 0
    assert sorted(index for indices in won.values() for index in indices) == list(range(_NUM_NAMES))
    assert problems == []
    assert num_seen > 0
    entries, broken = store.entries()
    assert broken == {}
    for entry in entries:
        assert int(entry.name.removeprefix("name-")) in won[entry.summary.count]
        assert set(store.fetch(entry).read_bytes()) == {entry.summary.count}
    assert len(list((tmp_path / "store").iterdir())) == 2 * _NUM_NAMES, "the losers leave nothing behind"

"""Tests that damaged store entries are named and skipped, and nothing outside the store is read or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from adapeft.subset.entry import Entry
from adapeft.subset.store import SubsetStore
from adapeft.subset.subset import Subset
from tests.adapeft.subset.test_damaged_subset import SUBSET
from tests.support.damage import check, damaged_bytes, damaged_safetensors, damaged_trees, examples


@pytest.fixture
def store(tmp_path) -> SubsetStore:
    """Return a store of one subset with measured metrics."""
    SUBSET.save(tmp_path / "subset.safetensors")
    metrics = {"metric": "accuracy", "before": {"accuracy": 0.5}, "after": {"accuracy": 0.75}}
    subset = Subset.load(tmp_path / "subset.safetensors")
    opened = SubsetStore(str(tmp_path / "store"))
    opened.add("mine", tmp_path / "subset.safetensors", subset.summary(None, metrics))
    return opened


@pytest.fixture
def path(store) -> Path:
    return Path(store.url) / "mine.json"


def check_entry(store: SubsetStore, path: Path) -> None:
    found = check(lambda: store.get("mine"), path, names="mine")
    entries, broken = store.entries()
    assert [entry.name for entry in entries] + list(broken) == ["mine"]
    if found is not None:
        assert isinstance(found, Entry)
        check(lambda: store.fetch(found), path, names="mine")


def test_entries(store, path):
    @examples(100)
    @given(damaged_bytes(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check_entry(store, path)

    run()


def test_what_entries_say(store, path):
    @examples(200)
    @given(damaged_trees(json.loads(path.read_text())))
    def run(tree: Any) -> None:
        path.write_text(json.dumps(tree))
        check_entry(store, path)

    run()


def test_a_token_stays_in_the_store(store, path):
    tree = json.loads(path.read_text())
    for token in ("../" + "0" * 29, "/" + "0" * 31, "0" * 31 + "\n", "0" * 32 + "/..", "\u0660" * 32):
        path.write_text(json.dumps({**tree, "token": token}))
        assert check(lambda: store.get("mine"), path, names="'mine' is damaged") is None


def test_stored_subsets(store):
    entry = store.get("mine")
    path = Path(store.url) / entry.file

    @examples(100)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        before = path.read_bytes()
        path.write_bytes(content)
        found = check(lambda: store.fetch(entry), path, names="mine")
        assert (found is not None) == (content == before)
        path.write_bytes(before)

    run()

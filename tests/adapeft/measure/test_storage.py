"""Statistics on disk load unchanged or are rejected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_table
from adapeft.measure.groups import Groups
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard
from adapeft.measure.storage import ELEMENTS, TABLE, load_groups, load_statistics, save_elements, save_groups
from adapeft.model.structure import ParameterInfo
from tests.support.thread_ranks import on_ranks

PARAMETERS = (
    ParameterInfo("a.weight", (3, 4), "weight", 2, 0.5, 1),
    ParameterInfo("a.bias", (5,), "bias", 2, 0.5, None),
)
KEY = {"model.name": "x", "select.groups": "element"}


def groups_of(granularity):
    return Groups(PARAMETERS, granularity, 99, ("head",), ("head",), "abc")


def shard(parameter, start, length):
    columns = {name: torch.rand(length) for name in ("slope", "curvature")}
    return ElementShard(Slice(parameter, start, length), columns)


@pytest.fixture
def saved(tmp_path):
    """Save the shards of three ranks, the last of them empty; return the folder and the saved values."""
    torch.manual_seed(0)
    groups = groups_of("element")
    shards = [(shard(0, 0, 7),), (shard(0, 7, 5), shard(1, 0, 5)), ()]
    columns = {"slope": np.array([1.0, -2.0]), "curvature": np.array([0.1, 0.2])}
    save_groups(tmp_path, groups, columns, KEY, influence=np.array([3.0, 4.0]), chosen=np.array([1, 0]))
    on_ranks(3, lambda ranks: save_elements(tmp_path, shards[ranks.rank], ranks))
    return tmp_path, groups, columns, [one for elements in shards for one in elements]


def shard_path(folder, rank):
    return folder / ELEMENTS / f"rank-{rank:05d}-of-00003.safetensors"


def test_groups_and_columns_without_what_was_derived(tmp_path):
    groups = groups_of("row")
    columns = {"slope": np.arange(5.0)}
    save_groups(tmp_path, groups, columns, KEY, influence=np.ones(5), chosen=np.ones(5, dtype=np.int64))
    loaded, loaded_columns, key = load_groups(tmp_path)
    assert (loaded, key) == (groups, KEY)
    assert list(loaded_columns) == ["slope"]
    np.testing.assert_array_equal(loaded_columns["slope"], columns["slope"])
    assert load_table(tmp_path / TABLE)["influence"].to_pylist() == [1.0] * 5
    statistics, _ = load_statistics(tmp_path)
    assert statistics.elements == ()


def test_elements_of_all_ranks(saved):
    folder, groups, columns, shards = saved
    statistics, key = load_statistics(folder)
    assert (statistics.groups, key) == (groups, KEY)
    for name, column in columns.items():
        np.testing.assert_array_equal(statistics.columns[name], column)
    assert [one.slice for one in statistics.elements] == [one.slice for one in shards]
    for actual, expected in zip(statistics.elements, shards, strict=True):
        assert set(actual.columns) == set(expected.columns)
        for name, column in expected.columns.items():
            assert torch.equal(actual.columns[name], column)


def test_a_method_that_measures_nothing_has_no_shards(tmp_path):
    save_groups(tmp_path, groups_of("element"), {}, KEY)
    assert load_statistics(tmp_path)[0].elements == ()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_shard(saved, missing):
    shard_path(saved[0], missing).unlink()
    with pytest.raises(AdapeftError, match=r"2 of 3 shards are there. Measure again"):
        load_statistics(saved[0])


def test_no_shard_at_all(saved):
    for rank in range(3):
        shard_path(saved[0], rank).unlink()
    with pytest.raises(AdapeftError, match="0 of 1 shards"):
        load_statistics(saved[0])


def test_a_truncated_shard(saved):
    path = shard_path(saved[0], 1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapeftError, match=r"rank-00001.* is not a shard of statistics, or it is truncated"):
        load_statistics(saved[0])


def test_a_foreign_shard(saved):
    save_file({"x": torch.ones(1)}, shard_path(saved[0], 1))
    with pytest.raises(AdapeftError, match="not one of adapeft's: expected a shard of statistics"):
        load_statistics(saved[0])


def test_no_table(tmp_path):
    with pytest.raises(AdapeftError, match=f"{TABLE}: no such file"):
        load_statistics(tmp_path)


def test_a_truncated_table(saved):
    path = saved[0] / TABLE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AdapeftError, match=f"{TABLE} is not a Parquet table, or it is truncated"):
        load_statistics(saved[0])


def test_a_foreign_table(saved):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1, 2]}), saved[0] / TABLE)
    with pytest.raises(AdapeftError, match="not a group table of adapeft"):
        load_statistics(saved[0])


def test_a_table_of_other_rows(saved):
    import pyarrow.parquet as pq

    table = load_table(saved[0] / TABLE)
    pq.write_table(table.slice(0, 1), saved[0] / TABLE)
    with pytest.raises(AdapeftError, match="1 rows for 2 groups"):
        load_statistics(saved[0])

"""Damaged statistics load as statistics to choose from, or raise an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapeft import AdapeftError
from adapeft.files.artifact import load_table
from adapeft.measure.groups import Groups
from adapeft.measure.low_rank.factored import OF_COLUMNS, OF_ROWS, FactoredShard
from adapeft.measure.options import Options
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.measure.storage import (
    ELEMENTS,
    OPTIONS,
    TABLE,
    load_groups,
    load_statistics,
    save_elements,
    save_groups,
    save_options,
)
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank
from tests.support.damage import check, damaged_bytes, damaged_safetensors, damaged_trees, examples

PARAMETERS = (
    ParameterInfo("a.weight", (3, 4), "weight", 2, 0.5, 1, is_linear=True, output_of="attention"),
    ParameterInfo("a.bias", (5,), "bias", 2, 0.5, None),
)
SHARD = f"{ELEMENTS}/rank-00000-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Save statistics of rows, with options of the matrix and a column of lists; return the folder."""
    groups = Groups(PARAMETERS, "row", 99, ("head",), ("head",), "abc")
    columns = {"slope": np.arange(5.0), "projections": np.ones((5, 3), np.float32)}
    save_groups(tmp_path / "run", groups, columns, {"model.name": "x"}, chosen=np.ones(5, dtype=np.int64))
    numbers = np.array([0, 2]), np.array([12, 14]), np.array([0.5, 0.25]), np.array([1.0, 1.0])
    save_options(tmp_path / "run", groups, Options(np.array([0, 0]), *numbers, np.ones((2, 3), np.float32)))
    return tmp_path / "run"


@pytest.fixture
def elements(tmp_path) -> Path:
    """Save statistics of elements; return the folder."""
    groups = Groups(PARAMETERS, "element", 99, ("head",), ("head",), "abc")
    save_groups(tmp_path / "run", groups, {"slope": np.ones(2)}, {"model.name": "x"})
    sizes = {name: (2, 3) for name in OF_ROWS[:2]} | {name: (4, 3) for name in OF_COLUMNS[:2]}
    sizes |= {"moment_rows": (2, 2), "moment_columns": (4, 2)}
    factored = FactoredShard(Slice(0, 0, 8), {name: torch.rand(size) for name, size in sizes.items()}, False)
    pieces = [Slice(0, 8, 4), Slice(1, 0, 5)]
    dense = tuple(ElementShard(piece, {"slope": torch.rand(piece.length)}) for piece in pieces)
    save_elements(tmp_path / "run", (factored, *dense), OneRank())
    return tmp_path / "run"


def check_whole(found: Statistics) -> None:
    groups = found.groups
    assert len(groups.counts) == len(groups.indices) == len(groups.parameter_of) == groups.num_groups
    for column in found.columns.values():
        assert len(column) == groups.num_groups
        assert column.dtype.kind in "iuf"
    if groups.granularity == "element" and found.columns:
        assert sum(shard.slice.length for shard in found.elements) == sum(info.count for info in groups.parameters)
    for shard in found.elements:
        assert all(len(column) == shard.slice.length for column in shard.columns.values())
    if found.options is not None:
        assert all(0 <= parameter < len(groups.parameters) for parameter in found.options.parameters)


@pytest.mark.parametrize("name", [TABLE, OPTIONS])
def test_tables(folder, name):
    path = folder / name

    @examples(150)
    @given(damaged_bytes(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: load_statistics(folder), path)
        if found is not None:
            check_whole(found[0])

    run()


def test_headers_of_tables(folder):
    path, table = folder / TABLE, load_table(folder / TABLE)
    header = json.loads(table.schema.metadata[b"adapeft"])

    @examples(150)
    @given(damaged_trees(header))
    def run(tree: Any) -> None:
        pq.write_table(table.replace_schema_metadata({"adapeft": json.dumps(tree)}), path)
        found = check(lambda: load_statistics(folder), path, names=f"{TABLE}|{OPTIONS}")
        if found is not None:
            check_whole(found[0])

    run()


@pytest.mark.parametrize("name", [TABLE, OPTIONS])
def test_columns_of_tables(folder, name):
    path, table = folder / name, load_table(folder / name)
    odd: tuple[Any, ...] = ("x", None, True, -1, 2**62, float("nan"), b"\xff", [1], {"a": 1})

    @examples(60)
    @given(st.sampled_from(table.column_names), st.sampled_from([*odd, ...]))
    def run(column: str, value: Any) -> None:
        place = table.column_names.index(column)
        changed = table.remove_column(place)
        if value is not ...:
            changed = changed.add_column(place, column, pa.array([value] * table.num_rows))
        pq.write_table(changed, path)
        found = check(lambda: load_statistics(folder), path)
        if found is not None:
            check_whole(found[0])

    run()


def test_shards_of_elements(elements):
    path = elements / SHARD

    @examples(200)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: load_statistics(elements), path, names=ELEMENTS)
        if found is not None:
            check_whole(found[0])

    run()


def test_a_table_that_claims_more_than_it_holds(folder):
    """Equal values take almost no space in a file but their full size in memory."""
    path = folder / TABLE
    header = load_table(path).schema.metadata
    count = 2**22
    pq.write_table(pa.table({"slope": np.zeros(count)}).replace_schema_metadata(header), path)
    assert path.stat().st_size < count / 100
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(AdapeftError, match=rf"{TABLE} is not a Parquet table.*it claims {count} values"):
        load_groups(folder)
    assert pa.default_memory_pool().max_memory() < before + count


def test_folders_above_make_no_columns(folder):
    folder.rename(folder.with_name("lr=1e-3"))
    assert list(load_groups(folder.with_name("lr=1e-3"))[1]) == ["slope", "projections"]

"""Statistics on disk: ``groups.parquet``, and for elements a file a rank, so that choosing again measures nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adapeft.artifact import load_table, load_tensors, provenance, save_table, save_tensors
from adapeft.errors import AdapeftError
from adapeft.inputs.structure import ParameterInfo
from adapeft.measure.groups import Groups
from adapeft.measure.options import Options
from adapeft.measure.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.rank_files import rank_path, rank_paths

TABLE = "groups.parquet"
OPTIONS = "options.parquet"
ELEMENTS = "statistics"
_DERIVED = ("influence", "chosen")
_DESCRIBED = ("parameter", "role", "layer", "depth", "index", "count")


def save_groups(
    folder: Path,
    groups: Groups,
    columns: Mapping[str, np.ndarray],
    key: Mapping[str, Any],
    **derived: np.ndarray,
) -> None:
    """Writes ``groups.parquet``: the groups, their statistics, and what was ``derived`` (influence, chosen elements).

    ``key`` is what the statistics depend on; see ``adapeft.config.measurement_key``.
    """
    assert set(derived) <= set(_DERIVED)
    header = {**asdict(groups), "key": dict(key), "provenance": provenance()}
    save_table(folder / TABLE, groups.to_table({**columns, **derived}, {"adapeft": json.dumps(header)}))


def save_options(folder: Path, groups: Groups, options: Options, **derived: np.ndarray) -> None:
    """Writes ``options.parquet``: a row an option of a matrix, and what was ``derived`` (influence, chosen)."""
    assert set(derived) <= set(_DERIVED)
    names = np.array([info.name for info in groups.parameters], dtype=object)
    columns = {
        "parameter": pa.array(names[options.parameters], pa.string()),
        "rank": options.ranks,
        "count": options.counts,
        "slope": options.slopes,
        "curvature": options.curvatures,
        **derived,
    }
    save_table(folder / OPTIONS, pa.table(columns))


def load_options(folder: Path, groups: Groups) -> Options | None:
    """What ``save_options`` wrote; None where nothing was.

    Raises:
        AdapeftError: the file is damaged, or of other groups.
    """
    path = folder / OPTIONS
    if not path.is_file():
        return None
    table = load_table(path)
    places = {info.name: index for index, info in enumerate(groups.parameters)}
    try:
        parameters = np.array([places[name] for name in table["parameter"].to_pylist()], dtype=np.int64)
        numbers = {name: table[name].to_numpy() for name in ("rank", "count", "slope", "curvature")}
    except KeyError as error:
        raise AdapeftError(f"{path}: options of other groups, or damaged ({error}). Measure again.") from error
    return Options(parameters, numbers["rank"], numbers["count"], numbers["slope"], numbers["curvature"])


def clear_elements(folder: Path) -> None:
    """Removes shards that an interrupted measurement, perhaps on another number of ranks, has left."""
    shutil.rmtree(folder / ELEMENTS, ignore_errors=True)


def save_elements(folder: Path, elements: tuple[ElementShard, ...], rank: int, world_size: int) -> None:
    """Writes this rank's shard of element statistics."""
    tensors = {f"{i}.{name}": column for i, shard in enumerate(elements) for name, column in shard.columns.items()}
    path = rank_path(folder / ELEMENTS, rank, world_size)
    save_tensors(path, "shard of statistics", tensors, {"slices": [asdict(shard.slice) for shard in elements]})


def load_groups(folder: Path) -> tuple[Groups, dict[str, np.ndarray], dict[str, Any]]:
    """Groups, their columns without what was derived, and the key they were measured under.

    Raises:
        AdapeftError: there are none, or the file is damaged or foreign.
    """
    table = load_table(folder / TABLE)
    try:
        header = json.loads((table.schema.metadata or {})[b"adapeft"])
        key = header.pop("key")
        header.pop("provenance")
        parameters = tuple(ParameterInfo(**{**info, "shape": tuple(info["shape"])}) for info in header["parameters"])
        always_train, new = tuple(header.pop("always_train")), tuple(header.pop("new"))
        groups = Groups(**{**header, "parameters": parameters}, always_train=always_train, new=new)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapeftError(f"{folder / TABLE}: not a group table of adapeft ({error}). Measure again.") from error
    if groups.num_groups != table.num_rows:
        raise AdapeftError(f"{folder / TABLE}: {table.num_rows} rows for {groups.num_groups} groups. Measure again.")
    names = [name for name in table.column_names if name not in (*_DESCRIBED, *_DERIVED)]
    return groups, {name: _as_numpy(table[name]) for name in names}, key


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """[K] numbers, or [K, M] from lists of one length."""
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    lists = column.combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), column.type.list_size)


def load_statistics(folder: Path) -> tuple[Statistics, dict[str, Any]]:
    """Everything measured in a run's folder, all ranks' shards together, and its key.

    Raises:
        AdapeftError: there is nothing, a rank's shard is missing, or a file is damaged.
    """
    groups, columns, key = load_groups(folder)
    elements: list[ElementShard] = []
    if groups.granularity == "element" and columns:
        for path in rank_paths(folder / ELEMENTS, "Measure again."):
            tensors, content = load_tensors(path, "shard of statistics")
            names = sorted({name.partition(".")[2] for name in tensors})
            elements += [
                ElementShard(Slice(**entry), {name: tensors[f"{index}.{name}"] for name in names})
                for index, entry in enumerate(content["slices"])
            ]
    return Statistics(groups, columns, tuple(elements), load_options(folder, groups)), key

"""Statistics on disk: ``groups.parquet``, and for elements one file per rank. A new choice reuses them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_table, load_tensors, provenance, save_table
from adapeft.files.damage import MOST, Count, Header, Line, reading
from adapeft.files.json_numbers import dumps, loads
from adapeft.files.rank_files import rank_paths, save_on_ranks, save_one_by_one
from adapeft.finite import check_finite
from adapeft.measure.groups import Groups, as_arrow
from adapeft.measure.low_rank.factored import OF_COLUMNS, OF_ROWS, FactoredShard
from adapeft.measure.options import Options
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics, check_columns, check_options
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import Ranks

TABLE = "groups.parquet"
OPTIONS = "options.parquet"
ELEMENTS = "statistics"
_SHARD = "shard of statistics"
_DERIVED = ("influence", "chosen")
_DESCRIBED = ("parameter", "role", "layer", "depth", "index", "count")


def save_groups(
    folder: Path,
    groups: Groups,
    columns: Mapping[str, np.ndarray],
    key: Mapping[str, Any],
    **derived: np.ndarray,
) -> None:
    """Write ``groups.parquet``: the groups, their statistics and the ``derived`` columns (influence, chosen elements).

    Args:
        key: everything that the statistics depend on; see ``adapeft.config.keys.measurement_key``.
    """
    assert set(derived) <= set(_DERIVED)
    header = {**asdict(groups), "key": dict(key), "provenance": provenance()}
    save_table(folder / TABLE, groups.to_table({**columns, **derived}, {"adapeft": dumps(header)}))


def save_options(folder: Path, groups: Groups, options: Options, **derived: np.ndarray) -> None:
    """Write ``options.parquet``: one row per option of a matrix, with the ``derived`` columns (influence, chosen)."""
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
    if options.projections is not None:
        columns["projections"] = as_arrow(options.projections)
    save_table(folder / OPTIONS, pa.table(columns))


def load_options(folder: Path, groups: Groups) -> Options | None:
    """Return the options that ``save_options`` wrote, or None if there is no file.

    Raises:
        AdapeftError: the file is damaged or belongs to other groups, or a statistic is not finite.
    """
    path = folder / OPTIONS
    if not path.is_file():
        return None
    table = load_table(path)
    places = {info.name: index for index, info in enumerate(groups.parameters)}
    with reading(f"{path}: damaged, or options of other groups", "Measure again."):
        parameters = np.array([places[name] for name in table["parameter"].to_pylist()], dtype=np.int64)
        numbers = {name: _as_numpy(table[name]) for name in ("rank", "count", "slope", "curvature")}
        if any(column.shape != parameters.shape for column in numbers.values()):
            raise ValueError("lists instead of numbers")
        if any(numbers[name].dtype.kind != "i" or (numbers[name] < 0).any() for name in ("rank", "count")):
            raise ValueError("a rank or count is not a non-negative integer")
        # Those of earlier versions have no projections.
        projections = _as_numpy(table["projections"]) if "projections" in table.column_names else None
        if projections is not None and projections.ndim != 2:
            raise ValueError("numbers instead of lists")
        integers, floats = (numbers["rank"], numbers["count"]), (numbers["slope"], numbers["curvature"])
        found = Options(parameters, *integers, *floats, projections)
        check_options(groups, found, str(path), "Measure again.")
        return found


def save_elements(folder: Path, elements: tuple[ElementShard, ...], ranks: Ranks) -> None:
    """Write every rank's shard of element statistics and replace older ones. Collective."""
    save_on_ranks(folder / ELEMENTS, _SHARD, *_as_file(elements), ranks)


def save_elements_one_by_one(folder: Path, pieces: Iterable[tuple[ElementShard, ...]], count: int) -> None:
    """Write ``count`` pieces of element statistics as the shards of as many ranks, with one in memory at a time."""
    save_one_by_one(folder / ELEMENTS, _SHARD, map(_as_file, pieces), count)


def _as_file(elements: Sequence[ElementShard]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors to write, each once, and the header, which says for the others where they are."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    keys: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for index, shard in enumerate(elements):
        for name, tensor in shard.tensors.items():
            # The pieces of a large matrix have one factor of columns, and safetensors writes no memory twice.
            own, key = f"{index}.{name}", (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and key in keys:
                shared[own] = keys[key]
            else:
                tensors[own], keys[key] = tensor, own
    return tensors, {"slices": [asdict(shard.slice) for shard in elements], "shared": shared}


def load_groups(folder: Path) -> tuple[Groups, dict[str, np.ndarray], dict[str, Any]]:
    """Return the groups, their columns without the derived ones, and the key under which they were measured.

    Raises:
        AdapeftError: the file is missing, damaged or not a group table, or a statistic is not finite.
    """
    table = load_table(folder / TABLE)
    with reading(f"{folder / TABLE}: not a group table of adapeft", "Measure again."):
        header = _Header.model_validate(loads((table.schema.metadata or {})[b"adapeft"]))
        groups = Groups(
            tuple(info.as_parameter() for info in header.parameters),
            header.granularity,
            header.num_total,
            tuple(header.always_train),
            tuple(header.new),
            header.fingerprint,
            unreached=tuple(header.unreached),
        )
        if groups.num_groups != table.num_rows:
            raise AdapeftError(
                f"{folder / TABLE}: {table.num_rows} rows for {groups.num_groups} groups. Measure again."
            )
        names = [name for name in table.column_names if name not in (*_DESCRIBED, *_DERIVED)]
        columns = {name: _as_numpy(table[name]) for name in names}
        check_columns(groups, columns, str(folder / TABLE), "Measure again.")
        return groups, _Columns(folder / TABLE, columns), header.key


class _Columns(dict[str, np.ndarray]):
    """Statistics by name. A column that the file lacks raises ``AdapeftError``, because the file is at fault."""

    def __init__(self, path: Path, columns: Mapping[str, np.ndarray]) -> None:
        super().__init__(columns)
        self._path = path

    def __missing__(self, name: str) -> np.ndarray:
        raise AdapeftError(f"{self._path}: column {name!r} is missing. Measure again.")


class _Parameter(Header):
    """A ``ParameterInfo`` in the header of a file."""

    name: Line
    shape: list[Count]
    role: Line
    layer: Annotated[int, Field(ge=-1, lt=2**31)]
    depth: Annotated[float, Field(ge=0, le=1)]
    output_dim: Literal[0, 1] | None
    is_linear: bool = False
    output_of: Literal["attention", "feed-forward"] | None = None
    is_quantized: bool = False

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if math.prod(max(size, 1) for size in self.shape) > MOST or (
            self.output_dim is not None and len(self.shape) != 2
        ):
            raise ValueError(f"{self.name!r} has the impossible shape {self.shape}")
        return self

    def as_parameter(self) -> ParameterInfo:
        return ParameterInfo(**{**dict(self), "shape": tuple(self.shape)})


class _Header(Header):
    parameters: list[_Parameter]
    granularity: Literal["tensor", "row", "element", "role"]
    num_total: Count
    always_train: list[Line]
    new: list[Line]
    fingerprint: Line
    unreached: list[Line] = []
    key: dict[str, Any]

    @model_validator(mode="after")
    def _can_be_counted(self) -> Self:
        if sum(math.prod(max(size, 1) for size in info.shape) for info in self.parameters) > MOST:
            raise ValueError("the parameters have more elements in total than any model")
        return self


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of numbers as [K], and a column of lists of equal length as [K, M]."""
    is_list = pa.types.is_fixed_size_list(column.type)
    dtype = column.type.value_type if is_list else column.type
    if not (pa.types.is_floating(dtype) or pa.types.is_integer(dtype)):
        raise TypeError(f"{dtype} instead of numbers")
    if not is_list:
        return column.to_numpy()
    lists = column.combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), column.type.list_size)


def load_statistics(folder: Path) -> tuple[Statistics, dict[str, Any]]:
    """Return the statistics in a run's folder, with the shards of all ranks, and their key.

    Raises:
        AdapeftError: there are no statistics, a rank's shard is missing, a file is damaged, or a statistic is not
            finite.
    """
    groups, columns, key = load_groups(folder)
    elements = load_elements(folder, groups) if groups.granularity == "element" and columns else ()
    return Statistics(groups, columns, elements, load_options(folder, groups)), key


def load_elements(folder: Path, groups: Groups) -> tuple[ElementShard, ...]:
    """Return the shards of all ranks, as views of the files; raises the same errors as ``load_statistics``."""
    elements: list[ElementShard] = []
    for path in rank_paths(folder / ELEMENTS, "Measure again."):
        elements += _load_shard(path, groups)
    _check_complete(folder / ELEMENTS, groups, elements)
    return tuple(elements)


class _Slice(Header):
    parameter: Count
    start: Count
    length: Count


class _ShardHeader(Header):
    slices: list[_Slice]
    shared: dict[str, str] = {}


def _load_shard(path: Path, groups: Groups) -> list[ElementShard]:
    tensors, content = load_tensors(path, _SHARD)
    with reading(f"{path}: damaged shard of statistics", "Measure again."):
        header = _ShardHeader.model_validate(content)
        of_slices: dict[int, dict[str, Tensor]] = {}
        for key, tensor in {**tensors, **{own: tensors[key] for own, key in header.shared.items()}}.items():
            index, _, name = key.partition(".")
            of_slices.setdefault(int(index), {})[name] = tensor
        slices = [Slice(**dict(piece)) for piece in header.slices]
        found = [_shard_of(piece, of_slices.pop(index), groups) for index, piece in enumerate(slices)]
        if of_slices:
            raise ValueError(f"tensors of {max(of_slices) + 1} slices, but it describes {len(slices)}")
        check_finite(tensors, str(path), "Measure again.")
        return found


def _shard_of(piece: Slice, tensors: dict[str, Tensor], groups: Groups) -> ElementShard:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.ndim not in (1, 2):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    if tensors.keys() == {*OF_ROWS, *OF_COLUMNS}:
        shard = FactoredShard(piece, tensors, groups.parameters[piece.parameter].output_dim == 1)
        shard.check()
        return shard
    for name, column in tensors.items():
        if len(column) != piece.length:
            raise ValueError(f"{name} is {list(column.shape)} for {piece.length} elements")
    return ElementShard(piece, tensors)


def _check_complete(folder: Path, groups: Groups, elements: Sequence[ElementShard]) -> None:
    """Check that every element occurs exactly once.

    Raises:
        AdapeftError: the slices of a parameter leave a gap or overlap; the message names the first such parameter.
    """
    ends = [0] * len(groups.parameters)
    for piece in sorted((shard.slice for shard in elements), key=lambda piece: (piece.parameter, piece.start)):
        if piece.parameter >= len(ends) or (piece.length and piece.start != ends[piece.parameter]):
            raise AdapeftError(f"{folder}: {piece} does not start where the slice before it ends. Measure again.")
        ends[piece.parameter] += piece.length
    for info, end in zip(groups.parameters, ends, strict=True):
        if end != info.count:
            raise AdapeftError(
                f"{folder}: only {end} of {info.count} elements of {info.name!r} are stored. Measure again."
            )

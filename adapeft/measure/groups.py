"""The group table: which parameters are chosen together, stored as columns over the groups."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.model.dense import obstacles
from adapeft.model.fingerprint import fingerprint_model
from adapeft.model.quantized import quantized_weights
from adapeft.model.structure import (
    ParameterInfo,
    always_trained,
    describe_parameters,
    match_patterns,
    new_parameters,
    parameter_names,
    unsaved_parameters,
)
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.sections.select import OnQuantized
from adapeft.servers import LAYERS, is_servable

if TYPE_CHECKING:
    from adapeft.sections.select import Select


@dataclass(frozen=True)
class Groups:
    """Groups of the candidate parameters at one granularity, K in all.

    At ``row`` granularity a matrix has one group per output neuron, and any other tensor is one group. At ``tensor``
    and ``element`` granularity there is one group per tensor; the statistics of its single elements are kept in shards.
    At ``role`` granularity the tensors of one role in all layers form one group, in the order of their first tensors:
    the semantic groups of Xu and Bu 2025.

    Attributes:
        parameters: the P candidates.
        granularity: ``tensor``, ``row``, ``element`` or ``role``.
        num_total: number of elements of the base model, to which a fractional budget refers.
        always_train: names of the parameters that are trained in addition to the chosen ones.
        new: names of the parameters that no base checkpoint holds.
        fingerprint: fingerprint of the base model; empty if only its structure was available.
        left_out: names of the parameters that would be candidates if their elements could be changed; see
            ``adapeft.model.dense``.
        unreached: names of the parameters left out of the candidates and of ``always_train`` because no batch of the
            calibration gave them a gradient.
    """

    parameters: tuple[ParameterInfo, ...]
    granularity: str
    num_total: int
    always_train: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    fingerprint: str = ""
    left_out: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether some candidates are quantized."""
        return any(info.is_quantized for info in self.parameters)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [P]: number of groups of each parameter."""
        return np.array([self._num_groups(info) for info in self.parameters], dtype=np.int64)

    @cached_property
    def firsts(self) -> np.ndarray:
        """int64 [P]: first group of each parameter, shared by the tensors of one role."""
        if self.granularity == "role":
            roles = {role: group for group, role in enumerate(dict.fromkeys(info.role for info in self.parameters))}
            return np.array([roles[info.role] for info in self.parameters], dtype=np.int64)
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [P + 1]: position of each parameter's first element among those of all candidates, and their number."""
        return np.concatenate([[0], np.cumsum([info.count for info in self.parameters], dtype=np.int64)])

    @cached_property
    def num_groups(self) -> int:
        """Number of groups, K."""
        return int((self.firsts + self.sizes).max(initial=0))

    def span(self, parameter: int) -> slice:
        """Return the groups of a parameter's elements as a slice of 0 … K."""
        first = int(self.firsts[parameter])
        return slice(first, first + int(self.sizes[parameter]))

    @cached_property
    def parameter_of(self) -> np.ndarray:
        """int64 [K]: parameter of each group, the first one if there are several."""
        if self.granularity == "role":
            return np.unique(self.firsts, return_index=True)[1]
        return np.repeat(np.arange(len(self.parameters)), self.sizes)

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [K]: number of elements of each group, which is its cost in a budget of parameters."""
        per_parameter = np.array([info.count for info in self.parameters], dtype=np.int64)
        if self.granularity == "role":
            counts = np.zeros(self.num_groups, dtype=np.int64)
            np.add.at(counts, self.firsts, per_parameter)
            return counts
        return np.repeat(per_parameter // np.maximum(self.sizes, 1), self.sizes)

    @cached_property
    def indices(self) -> np.ndarray:
        """int64 [K]: index along the output dimension for a row, -1 for whole tensors."""
        index = np.arange(self.num_groups) - self.firsts[self.parameter_of]
        return np.where(self.is_row[self.parameter_of], index, -1)

    @cached_property
    def is_row(self) -> np.ndarray:
        """bool [P]: whether a parameter is divided into rows."""
        return np.array([self._has_rows(info) for info in self.parameters], dtype=bool)

    def num_units(self, parameter: int) -> int:
        """Return the number of units of a parameter that can be chosen: rows, elements, or 1 for a whole tensor."""
        return self.parameters[parameter].count if self.granularity == "element" else int(self.sizes[parameter])

    def part(self, parameter: int, units: Tensor) -> Part:
        """Return the part of a parameter that consists of ``units``, ascending int64 indices below ``num_units``."""
        info = self.parameters[parameter]
        if self.granularity == "element":
            return Elements(info.shape, units)
        return Rows(info.shape, units, info.output_dim or 0) if self.is_row[parameter] else Whole(info.shape)

    def sums(self, parameter: int, start: int, values: Tensor) -> tuple[slice, Tensor]:
        """Sum ``values``, the elements of a parameter from flat position ``start``, over each of its groups.

        Returns:
            The groups that contain these elements, as a slice of 0 … K, and their sums in float64.
        """
        info = self.parameters[parameter]
        offset = int(self.firsts[parameter])
        if not self.is_row[parameter]:
            return slice(offset, offset + 1), values.sum(dtype=torch.float64).reshape(1)
        width = info.shape[1]
        first, last = start // width, -(-(start + len(values)) // width)
        padded = torch.nn.functional.pad(values, (start - first * width, last * width - start - len(values)))
        matrix = padded.view(last - first, width)
        if info.output_dim == 0:
            return slice(offset + first, offset + last), matrix.sum(1, dtype=torch.float64)
        return slice(offset, offset + width), matrix.sum(0, dtype=torch.float64)

    def without(self, unreached: Sequence[str]) -> Groups:
        """Return the groups without the parameters in ``unreached``, which are recorded as such."""
        left_out = set(unreached)
        return replace(
            self,
            parameters=tuple(info for info in self.parameters if info.name not in left_out),
            always_train=tuple(name for name in self.always_train if name not in left_out),
            unreached=(*self.unreached, *unreached),
        )

    def to_table(self, columns: dict[str, np.ndarray], metadata: dict[str, str]) -> pa.Table:
        """Return the table of ``groups.parquet``: the groups, then the given statistics, [K] or [K, M].

        Parameter, layer and depth are null for a group of several tensors.
        """
        names = np.array([info.name for info in self.parameters], dtype=object)
        roles = np.array([info.role for info in self.parameters], dtype=object)
        layers = np.array([info.layer for info in self.parameters], dtype=np.int32)
        depths = np.array([info.depth for info in self.parameters], dtype=np.float32)
        of = self.parameter_of
        several = np.bincount(self.firsts, minlength=self.num_groups) > 1
        described = {
            "parameter": pa.array(names[of], pa.string(), mask=several).dictionary_encode(),
            "role": pa.array(roles[of], pa.string()).dictionary_encode(),
            "layer": pa.array(layers[of], mask=several),
            "depth": pa.array(depths[of], mask=several),
            "index": self.indices,
            "count": self.counts,
        }
        measured = {name: as_arrow(column) for name, column in columns.items()}
        return pa.table({**described, **measured}).replace_schema_metadata(metadata)

    def _has_rows(self, info: ParameterInfo) -> bool:
        return self.granularity == "row" and info.output_dim is not None

    def _num_groups(self, info: ParameterInfo) -> int:
        return info.shape[info.output_dim] if self._has_rows(info) and info.output_dim is not None else 1


def as_arrow(column: np.ndarray) -> pa.Array:
    """Return a column of numbers from [K], or of lists of equal length from [K, M]."""
    if column.ndim == 1:
        return pa.array(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])


def build_groups(
    model: torch.nn.Module,
    granularity: str,
    *,
    always_train: Sequence[str] = ("auto",),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quantized_matrices: OnQuantized = "left out",
    servable: bool = False,
) -> Groups:
    """Divide the candidates among the model's parameters into groups.

    Args:
        model: the model, which may be on the meta device; only its structure is read.
        granularity: ``tensor``, ``row``, ``element`` or ``role``.
        always_train: patterns of parameters that are always trained; ``auto`` stands for a new head.
        include: patterns of candidates; empty means all parameters.
        exclude: patterns of parameters removed from the candidates.
        quantized_matrices: what becomes of candidates that bitsandbytes has quantized.
        servable: whether the candidates are only the weights on which vLLM and SGLang serve LoRA.

    Raises:
        AdapeftError: a pattern matches no parameter, no candidate has elements that can be changed, quantized
            candidates are refused, a quantized matrix is always trained, or with ``servable`` the delta would hold
            something that the servers do not load.
    """
    parameters = describe_parameters(model)
    names = parameter_names(model)
    new = new_parameters(model)
    always, all_quantized = always_trained(model, always_train), quantized_weights(model)
    whole = [name for name in always if name in all_quantized]
    if whole:
        raise AdapeftError(
            f"select.always_train: {len(whole)} matrices such as {whole[0]!r} are quantized "
            f"({all_quantized[whole[0]]}) and cannot be trained whole. Leave them out, or quantize the base while "
            f"loading it (model.quantization), which leaves what is always trained as it is."
        )
    included = match_patterns("select.include", list(include), names) if include else set(names.values())
    candidates = included - match_patterns("select.exclude", list(exclude), names) - always - set(new)
    if servable:
        _check_servable(always | set(new), all_quantized)
        candidates &= _servable(model, parameters)
        if not candidates:
            raise AdapeftError(
                f"select.servable = true: no candidate is a linear layer on which vLLM and SGLang serve LoRA (layers "
                f"called {', '.join(LAYERS)}). Widen select.include, or leave select.servable out and serve the merged "
                f"checkpoint (adapeft merge)."
            )
    unsaved = candidates & unsaved_parameters(model)
    if unsaved:
        warnings.warn(
            f"select: {len(unsaved)} parameters are left out, such as {min(unsaved)!r}: {type(model).__name__} does "
            f"not write them to its checkpoints, so their training would be lost.",
            stacklevel=2,
        )
        candidates -= unsaved
    quantized = {name: kind for name, kind in all_quantized.items() if name in candidates}
    if quantized and quantized_matrices == "refused":
        raise AdapeftError(
            f"select: this choice trains matrices whole, but {len(quantized)} candidates such as "
            f"{next(iter(quantized))!r} are quantized ({next(iter(quantized.values()))}). Choose rows, elements or "
            f"LoRA (select.groups: row or element, without the option tensor; select.method: lora), leave quantized "
            f"matrices out with select.exclude, or load the model without quantization."
        )
    possible = quantized.keys() if quantized_matrices == "candidate" else set()
    left_out = {name: why for name, why in obstacles(model).items() if name in candidates - possible}
    if candidates and len(left_out) == len(candidates):
        raise AdapeftError(f"select: no candidates are left. {_left_out(left_out)}")
    if left_out:
        warnings.warn(f"select: {_left_out(left_out)}", stacklevel=2)
    return Groups(
        parameters=tuple(info for info in parameters if info.name in candidates - left_out.keys() and info.count),
        granularity=granularity,
        num_total=sum(info.count for info in parameters if info.name not in new),
        always_train=tuple(info.name for info in parameters if info.name in always),
        new=new,
        fingerprint=fingerprint_model(model, new),
        left_out=tuple(left_out),
    )


def _check_servable(outside: Collection[str], quantized: Mapping[str, str]) -> None:
    if outside:
        raise AdapeftError(
            f"select.servable = true: {len(outside)} parameters such as {min(outside)!r} are new or in "
            f"select.always_train, and vLLM and SGLang load them from no adapter. Leave them out of "
            f"select.always_train, use a checkpoint that has its head, or leave select.servable out and serve the "
            f"merged checkpoint (adapeft merge)."
        )
    if quantized:
        name, kind = next(iter(quantized.items()))
        raise AdapeftError(
            f"select.servable = true: the base is quantized ({name!r} to {kind}), and adapeft export writes adapters "
            f"only for unquantized bases. Load the model without quantization, or leave select.servable out."
        )


def _servable(model: torch.nn.Module, parameters: Sequence[ParameterInfo]) -> set[str]:
    """Return the weights on which both servers load LoRA: those of untied linear layers that they know by name.

    PEFT finds a layer by the end of its path. A path that is also the end of another module's could be named only by
    a pattern, which SGLang does not interpret, so such a layer is left out.
    """
    words = [path.split(".") for path, _ in model.named_modules(remove_duplicate=False)]
    ends = {".".join(path[start:]) for path in words for start in range(1, len(path))}
    linear = {info.name for info in parameters if info.is_linear and is_servable(info.name)}
    return {name for name in linear if name.removesuffix(".weight") not in ends}


def _left_out(reasons: Mapping[str, str]) -> str:
    name, reason = next(iter(reasons.items()))
    return (
        f"{len(reasons)} parameters cannot be changed element by element and are left out, such as {name!r}, which "
        f"{reason}. Load the model without quantization to make them candidates."
    )


def groups_of(model: torch.nn.Module, settings: Select) -> Groups:
    """Build the groups for the ``select`` section of a config."""
    return build_groups(
        model,
        settings.granularity,
        always_train=settings.always_train,
        include=settings.include,
        exclude=settings.exclude,
        quantized_matrices=settings.quantized_matrices,
        servable=settings.servable,
    )

"""The form in which PEFT holds each change of a delta: LoRA, SHiRA, trainable tokens, or a module saved whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.model.structure import ParameterInfo, describe_parameters
from adapeft.parts.change import Change
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole

PREFIX = "base_model.model."
"""Prefix of parameter names in PEFT."""

REMEDY = "Merge it into a checkpoint (adapeft merge), or call Delta.apply."


@dataclass
class PeftParts:
    """The changes of a delta by their form in PEFT.

    Attributes:
        lora: weight → LoRA; k rows are exactly a matrix of rank k.
        biases: linear layer with LoRA → change of its bias.
        elements: weight → single elements, for SHiRA.
        tokens: embedding → rows of it, those of single elements too.
        whole: parameters and buffers that PEFT saves whole.
        modules: paths of the modules that PEFT saves whole.
        layers: paths of the modules that PEFT replaces by its own layers.
    """

    lora: dict[str, Change[Lora]] = field(default_factory=dict)
    biases: dict[str, Change] = field(default_factory=dict)
    elements: dict[str, Change[Elements]] = field(default_factory=dict)
    tokens: dict[str, Change[Rows]] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)

    @property
    def needs_lora(self) -> bool:
        """Whether a change needs an adapter of type LoRA."""
        return bool(self.lora or self.tokens)


def sort_for_peft(delta: Delta, structure: PreTrainedModel) -> PeftParts:
    """Sort the changes of ``delta`` by their form in PEFT.

    Args:
        delta: delta of a base with this structure.
        structure: model of the base, which may be on the meta device.

    Raises:
        AdapeftError: PEFT cannot hold a change. Names the parameter.
    """
    delta.check_shapes(structure)
    infos, places = {info.name: info for info in describe_parameters(structure)}, parameter_places(structure)
    found = PeftParts(whole=[*delta.new, *delta.buffers])
    for name, change in delta.changes.items():
        if change.part.is_empty:
            continue
        if not change.part.changes_parameter:
            raise AdapeftError(f"{name!r} has an adapter behind it: PEFT has no counterpart. Call Delta.apply.")
        if len(change.part.shape) == 1:
            found.whole.append(name)
            continue
        layer = _Layer(structure, infos[name], places[name])
        if not _hold(change.part, change.values, layer, found):
            tied = f", tied to {places[name][1]!r}" if len(places[name]) > 1 else ""
            raise AdapeftError(
                f"the delta changes {change.part.kind} of {name!r}, a parameter of {type(layer.module).__name__}{tied}"
                f": PEFT holds LoRA, rows and elements of untied linear layers, rows and elements of nn.Embedding, and "
                f"whole tensors. {REMEDY}"
            )
    for name in _too_dense(found.elements):
        del found.elements[name]
        found.layers.remove(owner_of(name))
        found.whole.append(name)
    for name in found.whole:
        path, _, local = name.rpartition(".")
        weight = infos.get(f"{path}.weight")
        if name in delta.changes and local == "bias" and weight and weight.is_linear and weight.name not in found.whole:
            _add_bias(found, path, weight, delta.changes[name])
        else:
            _save_whole(found, structure, places.get(name, [name]))
    _add_namesakes(found, structure)
    return found


class _Layer(NamedTuple):
    """A parameter in the model."""

    structure: PreTrainedModel
    info: ParameterInfo
    places: list[str]

    @property
    def module(self) -> nn.Module:
        """Module that holds the parameter."""
        return self.structure.get_submodule(owner_of(self.info.name))

    @property
    def paths(self) -> set[str]:
        """Paths of all modules that hold the parameter."""
        return {owner_of(place) for place in self.places}

    @property
    def has_tokens(self) -> bool:
        """Whether PEFT can train its rows as tokens; PEFT ties them in all weights tied to the input embeddings."""
        structure, module = self.structure, self.module
        is_input = structure.config.tie_word_embeddings and module is structure.get_input_embeddings()
        return is_plain(module, nn.Embedding) and (is_input or len(self.places) == 1)


@singledispatch
def _hold(part: Part, values: Tensor, layer: _Layer, found: PeftParts) -> bool:
    """Add the values of a part of a matrix to ``found`` in their form in PEFT; one function per kind of part.

    Returns:
        Whether PEFT can hold them.
    """
    return False


@_hold.register
def _(part: Whole, values: Tensor, layer: _Layer, found: PeftParts) -> bool:
    found.whole.append(layer.info.name)
    return True


@_hold.register
def _(part: Rows, values: Tensor, layer: _Layer, found: PeftParts) -> bool:
    if layer.info.is_linear:
        found.lora[layer.info.name] = _low_rank(part, values, layer.info.output_dim)
    elif layer.has_tokens and part.dim == 0:
        found.tokens[owner_of(layer.info.name)] = Change(part, values)
    else:
        return False
    found.layers |= layer.paths
    return True


@_hold.register
def _(part: Elements, values: Tensor, layer: _Layer, found: PeftParts) -> bool:
    if layer.info.is_linear and is_plain(layer.module, nn.Linear):
        found.elements[layer.info.name] = Change(part, values)
    elif layer.info.is_linear:
        return _hold_as_lora(part, values, layer, found)
    elif layer.has_tokens:
        found.tokens[owner_of(layer.info.name)] = _as_rows(part, values)
    else:
        return False
    found.layers |= layer.paths
    return True


@_hold.register
def _(part: Lora, values: Tensor, layer: _Layer, found: PeftParts) -> bool:
    if not (layer.info.is_linear and part.dim == layer.info.output_dim):
        return False
    found.lora[layer.info.name] = Change(part, values)
    found.layers |= layer.paths
    return True


def _hold_as_lora(part: Elements, values: Tensor, layer: _Layer, found: PeftParts) -> bool:
    """Add elements of a layer that SHiRA does not know, ``Conv1D``, as the LoRA of their rows or columns.

    A matrix for which the smaller of the two is larger than itself is saved whole.
    """
    lines = min((_as_rows(part, values, dim) for dim in range(2)), key=lambda change: len(change.values))
    if len(lines.values) * sum(part.shape) > math.prod(part.shape):
        return _hold(Whole(part.shape), values, layer, found)
    return _hold(lines.part, lines.values, layer, found)


def shira_rank(change: Change[Elements]) -> int:
    """Return the smallest r for which SHiRA's r (in + out) elements of a matrix hold those of ``change``."""
    return math.ceil(len(change.values) / sum(change.part.shape))


def _too_dense(elements: Mapping[str, Change[Elements]]) -> list[str]:
    """Return the matrices to save whole for the smallest file: SHiRA has one r for all matrices and pads with zeros.

    An element of SHiRA takes 12 bytes with its position, one of a whole matrix 4.
    """
    sizes = {name: math.prod(change.part.shape) for name, change in elements.items()}

    def too_dense(r: int) -> list[str]:
        return [n for n, c in elements.items() if shira_rank(c) > r or r * sum(c.part.shape) > sizes[n]]

    def num_bytes(r: int) -> int:
        whole = too_dense(r)
        return sum(4 * sizes[n] if n in whole else 12 * r * sum(c.part.shape) for n, c in elements.items())

    return too_dense(min({shira_rank(change) for change in elements.values()}, key=num_bytes)) if elements else []


def _as_rows(part: Elements, values: Tensor, dim: int = 0) -> Change[Rows]:
    """Return elements of a matrix as the rows along ``dim`` that they are in, with zeros for the others."""
    width = part.shape[1]
    places = (part.indices // width, part.indices % width)
    rows, own = torch.unique(places[dim], return_inverse=True)
    dense = values.new_zeros(len(rows), part.shape[1 - dim])
    dense[own, places[1 - dim]] = values
    return Change(Rows(part.shape, rows, dim), dense)


def _low_rank(part: Rows, values: Tensor, output_dim: int | None) -> Change[Lora]:
    """Return k rows, or k columns, as LoRA of rank k: the product of their values and a 0-1 selection matrix."""
    k, chosen = len(values), F.one_hot(part.indices, part.shape[part.dim]).float()
    a, b = (values, chosen.t()) if part.dim == output_dim else (chosen, values.t())
    low_rank = Lora(part.shape, output_dim or 0, k, float(k))
    return Change(low_rank, low_rank.joined([a, b]))


def _add_bias(found: PeftParts, path: str, weight: ParameterInfo, change: Change) -> None:
    """Add a bias to its layer's LoRA, or to a LoRA of zeros: far smaller than saving the layer whole."""
    found.biases[path] = change
    found.layers.add(path)
    if weight.name not in found.lora:
        part = Lora(weight.shape, weight.output_dim or 0, 1, 1.0)
        found.lora[weight.name] = Change(part, torch.zeros(part.count))


def _save_whole(found: PeftParts, structure: nn.Module, places: list[str]) -> None:
    """Add the modules that hold a parameter to those saved whole.

    Raises:
        AdapeftError: PEFT replaces the module by its own layer, or the module has submodules.
    """
    for place in places:
        path = owner_of(place)
        module = structure.get_submodule(path)
        if path in found.layers:
            raise AdapeftError(
                f"the delta changes {place!r} whole and other parameters of {path!r} in part: PEFT cannot hold both. "
                f"{REMEDY}"
            )
        if next(module.children(), None) is not None:
            raise AdapeftError(
                f"the delta changes {place!r}, a parameter of {type(module).__name__}, which has submodules: PEFT "
                f"would save all of them with it. {REMEDY}"
            )
        found.modules.add(path)


def _add_namesakes(found: PeftParts, structure: nn.Module) -> None:
    """Add the modules whose paths end with that of a saved one, because PEFT matches modules by the end of their path.

    Raises:
        AdapeftError: such a module has LoRA, SHiRA or submodules.
    """
    for path, module in structure.named_modules(remove_duplicate=False):
        saved = next((saved for saved in found.modules if f"{PREFIX}{path}".endswith(saved)), None)
        if path in found.modules or saved is None:
            continue
        if path in found.layers or next(module.children(), None) is not None:
            raise AdapeftError(
                f"PEFT would save {path!r} like {saved!r}, which the delta changes, because their names end alike, and "
                f"cannot do so. {REMEDY}"
            )
        found.modules.add(path)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module has the forward of ``kind``, which SHiRA and trainable tokens reimplement."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def parameter_places(structure: nn.Module) -> dict[str, list[str]]:
    """Return parameter → all its names in the model, several if it is tied."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in structure.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_id.values()}


def owner_of(name: str) -> str:
    """Return the path of the module that holds a parameter."""
    return name.rpartition(".")[0]

"""What PEFT holds each change of a delta as: LoRA, SHiRA, tokens of an embedding, or a module saved whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.model.structure import ParameterInfo, describe_parameters
from adapeft.parts.change import Change
from adapeft.parts.part import Part

PREFIX = "base_model.model."
"""What PEFT puts before a parameter's name."""

REMEDY = "Merge it into a checkpoint (adapeft merge), or call Delta.apply."


@dataclass
class PeftParts:
    """The changes of a delta by what PEFT holds them as.

    Attributes:
        lora: weight → LoRA; k rows are exactly a matrix of rank k.
        biases: linear layer → the change of its bias, beside LoRA.
        elements: weight → single elements, for SHiRA.
        tokens: embedding → rows of it.
        modules: paths of the modules saved whole.
        layers: paths at which PEFT puts a layer of its own.
    """

    lora: dict[str, Change] = field(default_factory=dict)
    biases: dict[str, Change] = field(default_factory=dict)
    elements: dict[str, Change] = field(default_factory=dict)
    tokens: dict[str, Change] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)

    @property
    def needs_lora(self) -> bool:
        """Whether some change goes into an adapter of type LoRA alone."""
        return bool(self.lora or self.tokens)


def sort_for_peft(delta: Delta, structure: PreTrainedModel) -> PeftParts:
    """Sorts the changes of ``delta``.

    Args:
        delta: of a base with this structure.
        structure: the model, which may be on the meta device.

    Raises:
        AdapeftError: PEFT cannot hold a change; names the parameter.
    """
    delta.check_shapes(structure)
    infos, places = {info.name: info for info in describe_parameters(structure)}, parameter_places(structure)
    found, whole = PeftParts(), [*delta.new, *delta.buffers]
    for name, change in delta.changes.items():
        part = change.part
        if part.indices is not None and not len(part.indices):
            continue
        if part.kind == "adapter":
            raise AdapeftError(f"{name!r} has an adapter behind it: PEFT has no counterpart of it. Call Delta.apply.")
        holder = _holder(structure, infos[name], part, places[name])
        if holder == "lora":
            found.lora[name] = change if part.kind == "lora" else _low_rank(change, infos[name].output_dim)
        elif holder == "elements":
            found.elements[name] = change
        elif holder == "tokens":
            found.tokens[owner_of(name)] = change
        else:
            whole.append(name)
            continue
        found.layers |= {owner_of(place) for place in places[name]}
    for name in _too_dense(found.elements):
        del found.elements[name]
        found.layers.remove(owner_of(name))
        whole.append(name)
    for name in whole:
        path, _, local = name.rpartition(".")
        weight = infos.get(f"{path}.weight")
        if name in delta.changes and local == "bias" and weight and weight.is_linear and weight.name not in whole:
            _add_bias(found, path, weight, delta.changes[name])
        else:
            _save_whole(found, structure, places.get(name, [name]))
    _add_namesakes(found, structure)
    return found


def _holder(
    structure: PreTrainedModel, info: ParameterInfo, part: Part, places: list[str]
) -> Literal["lora", "elements", "tokens", "module"]:
    """What PEFT holds a change as.

    Raises:
        AdapeftError: nothing of PEFT's holds it.
    """
    if part.kind == "tensor" or len(part.shape) == 1:
        return "module"
    module = structure.get_submodule(owner_of(info.name))
    if info.is_linear and (part.kind == "rows" or (part.kind == "lora" and part.dim == info.output_dim)):
        return "lora"
    if info.is_linear and part.kind == "elements" and is_plain(module, nn.Linear):
        return "elements"
    # What is tied to the input embeddings PEFT ties to their tokens too.
    is_input = structure.config.tie_word_embeddings and module is structure.get_input_embeddings()
    if is_plain(module, nn.Embedding) and part.kind == "rows" and part.dim == 0 and (is_input or len(places) == 1):
        return "tokens"
    tied = f", tied to {places[1]!r}" if len(places) > 1 else ""
    raise AdapeftError(
        f"the delta changes {part.kind} of {info.name!r}, a parameter of {type(module).__name__}{tied}: PEFT holds "
        f"LoRA and rows of untied linear layers, single elements of untied nn.Linear, rows of nn.Embedding, and whole "
        f"tensors. {REMEDY}"
    )


def shira_rank(change: Change) -> int:
    """The least r with which SHiRA's r (in + out) elements of a matrix hold those of ``change``."""
    return math.ceil(len(change.values) / sum(change.part.shape))


def _too_dense(elements: Mapping[str, Change]) -> list[str]:
    """Matrices to save whole, so that the file is smallest: SHiRA has one r for all, and fills up with zeros.

    An element of SHiRA is 12 bytes, with its position, one of a whole matrix 4.
    """
    sizes = {name: math.prod(change.part.shape) for name, change in elements.items()}

    def too_dense(r: int) -> list[str]:
        return [n for n, c in elements.items() if shira_rank(c) > r or r * sum(c.part.shape) > sizes[n]]

    def num_bytes(r: int) -> int:
        whole = too_dense(r)
        return sum(4 * sizes[n] if n in whole else 12 * r * sum(c.part.shape) for n, c in elements.items())

    return too_dense(min({shira_rank(change) for change in elements.values()}, key=num_bytes)) if elements else []


def _low_rank(change: Change, output_dim: int | None) -> Change:
    """k rows, or k columns, as LoRA of rank k: the product of their values and a selection of ones and zeros."""
    part, k = change.part, len(change.values)
    assert part.indices is not None
    chosen = F.one_hot(part.indices, part.shape[part.dim]).float()
    a, b = (change.values, chosen.t()) if part.dim == output_dim else (chosen, change.values.t())
    low_rank = Part("lora", part.shape, None, output_dim or 0, rank=k, alpha=float(k))
    return Change(low_rank, torch.cat([a.flatten(), b.flatten()]))


def _add_bias(found: PeftParts, path: str, weight: ParameterInfo, change: Change) -> None:
    """Puts a bias beside its layer's LoRA, or beside one of zeros: far smaller than the layer saved whole."""
    found.biases[path] = change
    found.layers.add(path)
    if weight.name not in found.lora:
        part = Part("lora", weight.shape, None, weight.output_dim or 0, rank=1, alpha=1.0)
        found.lora[weight.name] = Change(part, torch.zeros(part.count))


def _save_whole(found: PeftParts, structure: nn.Module, places: list[str]) -> None:
    """Adds the modules that hold a parameter to those saved whole.

    Raises:
        AdapeftError: PEFT puts a layer of its own there, or the module has others inside.
    """
    for place in places:
        path = owner_of(place)
        module = structure.get_submodule(path)
        if path in found.layers:
            raise AdapeftError(
                f"the delta changes {place!r} whole and more of {path!r} in part: PEFT has no place for both. {REMEDY}"
            )
        if next(module.children(), None) is not None:
            raise AdapeftError(
                f"the delta changes {place!r}, a parameter of {type(module).__name__}, which has modules inside: "
                f"PEFT would save all of them with it. {REMEDY}"
            )
        found.modules.add(path)


def _add_namesakes(found: PeftParts, structure: nn.Module) -> None:
    """Adds the modules whose names end as those of saved ones do: PEFT takes them for the same.

    Raises:
        AdapeftError: such a module has LoRA or SHiRA, or others inside.
    """
    for path, module in structure.named_modules(remove_duplicate=False):
        saved = next((saved for saved in found.modules if f"{PREFIX}{path}".endswith(saved)), None)
        if path in found.modules or saved is None:
            continue
        if path in found.layers or next(module.children(), None) is not None:
            raise AdapeftError(f"PEFT takes {path!r} for {saved!r}, which the delta changes: no place for it. {REMEDY}")
        found.modules.add(path)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes as ``kind`` does: SHiRA and trainable tokens compute so in its place."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def parameter_places(structure: nn.Module) -> dict[str, list[str]]:
    """Parameter → all names it has in the model; more than one when it is tied."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in structure.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_id.values()}


def owner_of(name: str) -> str:
    """Path of the module that holds a parameter."""
    return name.rpartition(".")[0]

"""Conversion of a PEFT adapter into a delta of the base that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adapeft.deltas.base import Base, open_base
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError, did_you_mean
from adapeft.formats.peft.adapter import MERGE_IN_PEFT, LowRank, PeftAdapter, read_adapter
from adapeft.formats.peft.parts import is_plain, owner_of, parameter_places
from adapeft.model.fingerprint import base_name, digests_of
from adapeft.model.structure import describe_parameters, is_linear_layer
from adapeft.parts.change import Change
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.tasks.registry import TASKS


def load_from_peft(folder: str | Path, base: str, task: str | None = None, *, revision: str | None = None) -> Delta:
    """Load a PEFT LoRA adapter as a delta.

    LoRA stays LoRA, except that one of a rank above the smaller side of its matrix becomes a dense difference. Modules
    saved whole become differences to the base, or new parameters if the base does not have them. Biases of LoRA and
    trainable tokens become differences.

    Args:
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: folder or hub name of the base that the adapter was trained on, with safetensors weights.
        task: name of the task; None for that of the adapter.
        revision: branch, tag or commit of a base on the hub; None for the one that the adapter names.

    Raises:
        AdapeftError: the adapter has a feature without a counterpart in a delta, or does not fit the base.
    """
    adapter = read_adapter(folder)
    of_type = (name for name, known in TASKS.items() if known.export_type == str(adapter.task_type))
    task = task or next(of_type, None)
    if task is None or task not in TASKS:
        known = " or ".join(TASKS)
        raise AdapeftError(f"{folder}: task_type = {adapter.task_type!r} is not supported. Give --task {known}.")
    if revision is None and not Path(base).is_dir():
        revision = adapter.revision
    opened = open_base(base, task, {}, revision)
    labels = _labels(adapter, opened) if TASKS[task].has_head else {}
    if labels:
        opened = open_base(base, task, labels, revision)
    stored = opened.checkpoint.stored()
    new = tuple(name for name in opened.checkpoint.parameters() if name not in stored)
    making = _Making(str(folder), opened, new)
    making.add_saved(adapter)
    for path, low_rank in adapter.layers.items():
        making.add_layer(path, low_rank)
    for path, (indices, rows) in adapter.tokens.items():
        making.add_rows(path, indices, rows)
    description = {"method": "lora", "model": {"name": base, "task": task, "labels": labels}}
    digests = digests_of(opened.checkpoint.entries(new))
    fingerprint = opened.checkpoint.fingerprint(new)
    return Delta(making.changes, making.new, fingerprint, description, making.buffers, digests)


def _labels(adapter: PeftAdapter, base: Base) -> dict[str, Any]:
    """Return the number of classes of a head in the adapter, as options of the config."""
    prefix = base.structure.base_model_prefix
    own = {base_name(name, prefix): parameter.shape for name, parameter in base.structure.named_parameters()}
    for name, value in adapter.whole.items():
        shape = own.get(base_name(name, prefix))
        if shape and value.ndim and value.shape[1:] == shape[1:] and len(value) != shape[0] == base.config.num_labels:
            return {"num_labels": len(value)}
    return {}


class _Making:
    """Collects the changes and new parameters of a delta from an adapter."""

    def __init__(self, folder: str, base: Base, new: tuple[str, ...]) -> None:
        self.folder, self.base, self.new_names = folder, base, new
        self.changes: dict[str, Change] = {}
        self.new: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.infos = {info.name: info for info in describe_parameters(base.structure)}
        self.places = parameter_places(base.structure)
        prefix = base.structure.base_model_prefix
        self._by_base_name = {
            base_name(place, prefix): (name, place) for name, places in self.places.items() for place in places
        }

    def add_saved(self, adapter: PeftAdapter) -> None:
        """Add the modules that the adapter holds whole, as new parameters or differences to the base.

        Raises:
            AdapeftError: the base has no such parameters, or the adapter lacks some that the base does not hold.
        """
        saved: dict[str, dict[str, Tensor]] = {}
        buffers = {name: buffer.shape for name, buffer in self.base.structure.named_buffers()}
        before = self.base.checkpoint.read(buffers)
        for key, value in adapter.whole.items():
            if buffers.get(key) == value.shape:
                if key not in before or not torch.equal(before[key], value):
                    self.buffers[key] = value
                continue
            name, place = self._find(key)
            if value.shape != self.infos[name].shape:
                self._refuse(f"{key!r} has shape {tuple(value.shape)}, but {self.infos[name].shape} in the base")
            saved.setdefault(name, {})[place] = value.float()
        missing = [name for name in self.new_names if name not in saved]
        if missing:
            raise AdapeftError(
                f"{self.folder}: neither the adapter nor the base holds {missing[0]!r} under this name: it would stay "
                f"random. Save the head with the adapter (modules_to_save), or give --model a base that has one."
            )
        before = self.base.checkpoint.read([name for name in saved if name not in self.new_names])
        for name, values in saved.items():
            value, *others = values.values()
            if name in self.new_names:
                self.new[name] = value
                continue
            if before[name].shape != value.shape:
                self._refuse(f"{name!r} has shape {tuple(value.shape)}, but {tuple(before[name].shape)} in the base")
            if not all(torch.equal(value, other) for other in others):
                self._refuse(f"{' and '.join(values)} differ, but are tied in the base")
            difference = value - before[name].float()
            if difference.any() and len(values) < len(self.places[name]):
                self._refuse(f"{', '.join(values)} is saved alone, but the base ties {', '.join(self.places[name])}")
            self._add_difference(name, difference)

    def add_layer(self, path: str, low_rank: LowRank) -> None:
        """Add LoRA and its bias."""
        name, _ = self._find(f"{path}.weight")
        info, module = self.infos[name], self.base.structure.get_submodule(owner_of(name))
        if len(self.places[name]) > 1:
            self._refuse(f"LoRA on {name!r}, which the base ties to {self.places[name][1]!r}: PEFT changes only one")
        dim = 1 if low_rank.is_embedding else info.output_dim
        if dim is None or not (is_plain(module, nn.Embedding) if low_rank.is_embedding else is_linear_layer(module)):
            self._refuse(f"LoRA on {name!r}, a parameter of {type(module).__name__}")
        rank, shape = len(low_rank.a), info.shape
        if (len(low_rank.b), low_rank.a.shape[1]) != (shape[dim], shape[1 - dim]):
            self._refuse(
                f"LoRA on {name!r} adds {len(low_rank.b)} × {low_rank.a.shape[1]} to a weight of shape {shape}"
            )
        part = Lora(shape, dim, rank, low_rank.alpha)
        values = part.joined([low_rank.a, low_rank.b])
        if rank <= min(shape):
            self._add(name, Change(part, values))
        else:
            self._add_difference(name, part.difference(values))
        if low_rank.bias is not None and low_rank.bias.any():
            bias, _ = self._find(f"{path}.bias")
            self._add_difference(bias, low_rank.bias.float() * (low_rank.alpha / rank))

    def add_rows(self, path: str, indices: Tensor, rows: Tensor) -> None:
        """Add trainable tokens, which hold new values of rows of an embedding."""
        name, _ = self._find(f"{path}.weight")
        structure, shape = self.base.structure, self.infos[name].shape
        module = structure.get_submodule(owner_of(name))
        is_input = structure.config.tie_word_embeddings and module is structure.get_input_embeddings()
        if name in self.new or not is_plain(module, nn.Embedding):
            self._refuse(f"tokens of {name!r}, a parameter of {type(module).__name__}")
        if len(self.places[name]) > 1 and not is_input:
            self._refuse(f"tokens of {name!r}, which the base ties to {self.places[name][1]!r}: PEFT changes only one")
        order = indices.argsort()
        fits = rows.shape == (len(indices), *shape[1:]) and int(indices.max()) < shape[0]
        if not fits or len(indices.unique()) < len(indices):
            self._refuse(f"{len(indices)} rows of shape {tuple(rows.shape[1:])} do not fit {name!r} of shape {shape}")
        before = self.base.checkpoint.read([name])[name]
        difference = rows[order].float() - before[indices[order]].float()
        self._add(name, Change(Rows(shape, indices[order]), difference))

    def _find(self, key: str) -> tuple[str, str]:
        """Return the parameter of ``key`` and the matching one of its names, with or without the base model's prefix.

        Raises:
            AdapeftError: the base has no such parameter.
        """
        found = self._by_base_name.get(base_name(key, self.base.structure.base_model_prefix))
        if found is None:
            raise AdapeftError(
                f"{self.folder}: trains {key!r}, which this base does not have.{did_you_mean(key, self.infos)} Give "
                f"--model the base of the adapter."
            )
        return found

    def _add_difference(self, name: str, difference: Tensor) -> None:
        if difference.shape != self.infos[name].shape:
            self._refuse(f"{name!r} has shape {self.infos[name].shape}, but its change {tuple(difference.shape)}")
        if difference.any():
            self._add(name, Change(Whole(self.infos[name].shape), difference))

    def _add(self, name: str, change: Change) -> None:
        if name in self.changes or name in self.new:
            self._refuse(f"{name!r} is changed in two ways")
        self.changes[name] = change

    def _refuse(self, what: str) -> NoReturn:
        raise AdapeftError(f"{self.folder}: {what}. {MERGE_IN_PEFT}")

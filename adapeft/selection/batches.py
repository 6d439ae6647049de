"""Batches from a user's script, as a DataLoader of the Trainer yields them, checked and moved to the model's device."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.tasks.losses.function import FunctionLoss
from adapeft.tasks.losses.objective import IGNORED, Objective
from adapeft.tasks.losses.own_loss import logits_of

_DIVISOR = "num_items_in_batch"
"""Divisor of summed losses in the Trainer; measuring divides by its own count of predictions over all batches."""

_COMPLETIONS = "completion_mask"
"""Mask of the answers in the batches of TRL's preference trainers, such as DPOTrainer's."""

_SPAN = ("start_positions", "end_positions")
"""Labels of question answering, which transformers passes separately."""


def as_batches(batches: Iterable[Mapping[str, Any]], model: nn.Module) -> list[Batch]:
    """Return the batches on the device of ``model``, with their examples numbered consecutively.

    Raises:
        AdapeftError: there are fewer than two batches, or one is not a mapping, has no labels, or contains an input
            that the model's forward does not accept.
    """
    device = next(model.parameters()).device
    known = _known_inputs(model)
    found, seen = [], 0
    for index, given in enumerate(mappings(batches)):
        batch = _with_spans(given, index)
        inputs = {name: value for name, value in batch.items() if name not in ("labels", _DIVISOR)}
        for name, value in inputs.items():
            _check_input(name, value, index, known)
        labels = _labels(batch, index)
        found.append(Batch(inputs, labels, torch.arange(seen, seen + len(labels))).to(device))
        seen += len(labels)
    return found


def mappings(batches: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the batches.

    Raises:
        AdapeftError: there are fewer than two, or one is not a mapping.
    """
    found = list(batches)
    for index, batch in enumerate(found):
        if not isinstance(batch, Mapping):
            raise AdapeftError(
                f"batch {index} is a {type(batch).__name__}. Pass mappings of the model's inputs and 'labels', such as "
                "those of the data collators of transformers."
            )
    if len(found) < 2:
        raise AdapeftError(
            f"batches: {len(found)} given, but at least 2 are needed to measure direction and gain on different ones."
        )
    return found


def batches_of_function(loss: FunctionLoss, batches: Iterable[Mapping[str, Any]], model: nn.Module) -> list[Batch]:
    """Return the batches on the device of ``model``, as batches of ``loss``. Computes their loss once.

    Args:
        loss: loss that the user gave as a function.
        batches: batches as the user gave them.
        model: model, in the mode in which it is measured.

    Raises:
        AdapeftError: there are fewer than two batches, or the function does not take one.
    """
    device = next(model.parameters()).device
    moved = [
        tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, dict(batch))
        for batch in mappings(batches)
    ]
    return [loss.batch(model, batch, index) for index, batch in enumerate(moved)]


def examples_of(batches: list[Batch], method: str) -> list[Batch]:
    """Divide the batches into batches of one example.

    Args:
        batches: batches from ``as_batches``.
        method: name of the method that measures example by example, for messages.

    Raises:
        AdapeftError: a batch cannot be divided.
    """
    for index, batch in enumerate(batches):
        if name := _packing(batch):
            raise AdapeftError(
                f"select.method = {method} measures example by example, but batch {index} is packed: according to "
                f"{name!r}, several examples share a row. Pass batches with one example per row, or use another method."
            )
    return [batch.example(index) for batch in batches for index in range(len(batch.labels))]


@torch.no_grad()
def check_labels(objective: Objective, batches: Sequence[Batch], model: nn.Module) -> None:
    """Check all labels before any loss is computed, because on a GPU an invalid class aborts the process.

    Args:
        objective: objective that reads the labels.
        batches: batches from ``as_batches``.
        model: model whose logits determine the number of outputs.

    Raises:
        AdapeftError: a label is outside the model's outputs.
    """
    first = batches[0]
    valid = torch.where(first.labels == IGNORED, first.labels, 0)  # an encoder-decoder reads them
    num_outputs = logits_of(objective, replace(first, labels=valid), model).shape[-1]
    for index, batch in enumerate(batches):
        own_outputs = objective.num_outputs(batch, num_outputs)
        outside = objective.outside(batch.labels, own_outputs)
        if len(outside):
            where, _, remedy = objective.outputs(own_outputs).partition(". ")
            raise AdapeftError(
                f"labels of batch {index} (counted from 0): {outside[0].item()} is outside {where} "
                f"({len(outside)} such labels in the batch). {remedy}."
            )


def _with_spans(batch: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Return the batch with the labels of question answering, if it has such and no others."""
    start, end = (batch.get(name) for name in _SPAN)
    if batch.get("labels") is not None or not (isinstance(start, Tensor) and isinstance(end, Tensor)):
        return batch
    if start.numel() != end.numel():
        raise AdapeftError(
            f"batch {index} has {start.numel()} start_positions and {end.numel()} end_positions. Pass one of each per "
            f"example."
        )
    rest = {name: value for name, value in batch.items() if name not in _SPAN}
    return {**rest, "labels": torch.stack([start.flatten(), end.flatten()], 1)}


def _known_inputs(model: nn.Module) -> set[str] | None:
    """Return the argument names of the model's forward, or None if it accepts any."""
    parameters = inspect.signature(model.forward).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if is_open else set(parameters)


def _check_input(name: str, value: Any, index: int, known: set[str] | None) -> None:
    if known is not None and name not in known:
        raise AdapeftError(
            f"batch {index} contains {name!r}, which the model's forward does not accept (it accepts "
            f"{', '.join(sorted(known))}). Remove that column, as the Trainer's remove_unused_columns does."
        )
    if value is not None and not isinstance(value, Tensor | bool | int | float):
        raise AdapeftError(
            f"batch {index} contains {name!r}, which is a {type(value).__name__}; inputs must be tensors or numbers. "
            "Remove it, or let the data collator convert it to a tensor (return_tensors='pt')."
        )


def _labels(batch: Mapping[str, Any], index: int) -> Tensor:
    """Return the labels of a batch, integers converted to int64, which every loss accepts."""
    if batch.get("labels") is None:
        found = ", ".join(map(repr, batch))
        if _COMPLETIONS in batch:
            raise AdapeftError(
                f"a batch has no 'labels', but answers to compare, as those of preference trainers: {found}. Give the "
                f"trainer's loss, a function of the model and a batch, as loss= (deploy/examples/dpo.py does so)."
            )
        raise AdapeftError(
            f"a batch has no 'labels', only {found}. Measuring needs labels in every batch, or a function of the model "
            f"and a batch as loss=."
        )
    labels = batch["labels"]
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        given = f"of shape {list(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise AdapeftError(f"labels of batch {index} are {given}. Pass a tensor with one row per example.")
    return labels if labels.is_floating_point() else labels.long()


def _packing(batch: Batch) -> str:
    """Return the name of the input that shows that rows hold several examples, or an empty string if none does."""
    lengths = batch.inputs.get("cu_seq_lens_q")
    if lengths is not None and len(lengths) - 1 > len(batch.labels):
        return "cu_seq_lens_q"
    sequences = batch.inputs.get("seq_idx")
    if sequences is not None and bool((sequences != sequences[..., :1]).any()):
        return "seq_idx"
    positions = batch.inputs.get("position_ids")
    if positions is None or positions.ndim < 2:
        return ""
    # Positions of padding are arbitrary; between two real tokens they decrease only where an example begins.
    mask = batch.inputs.get("attention_mask")
    real = torch.ones_like(positions) if mask is None or mask.ndim != 2 else mask.expand_as(positions)
    restarts = (positions.diff(dim=-1) < 0) & (real[..., 1:] != 0) & (real[..., :-1] != 0)
    return "position_ids" if bool(restarts.any()) else ""

"""Checks of a model's forward pass: its own loss equals the measured one; padding and packing change no logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.errors import AdapeftError
from adapeft.tasks.losses.objective import Objective
from adapeft.tasks.losses.pieces import rows_in_double

_ROUNDINGS = 4
"""Tolerance of a mean cross-entropy, in units of rounding. On a CPU the largest difference, for 1 to 4,000 predictions
in any precision, was 1.3."""

_REMEDY = (
    "Usual causes: config.output_router_logits adds the auxiliary loss of a mixture of experts; class weights or label "
    "smoothing; the sum of several tasks' losses; or labels of a language model that are shifted twice or not at all. "
    "Switch this off for measuring, give a model and batches with a supported loss, or name the loss to measure in "
    "adapeft.select: loss= with a task or a function."
)


@torch.no_grad()
def check_own_loss(objective: Objective, batch: Batch, model: nn.Module) -> None:
    """Check that the model's own mean loss of ``batch`` equals the objective's.

    Runs the model twice, and a third time to find out why logits differ. The losses must agree up to rounding in the
    precision in which the model computes its loss; a loss that is not finite is not compared.

    Args:
        objective: objective of the measurement.
        batch: batch with at least one prediction and with labels within the model's outputs.
        model: model, or an engine around it, in evaluation mode. Under ZeRO every rank must pass the same batch.

    Raises:
        AdapeftError: the model returns no loss or no logits, logits of another shape, or another loss.
    """
    batch = objective.excerpt(model, batch)
    labels = batch.labels
    logits = logits_of(objective, batch, model)
    output = _with_labels(objective, model, batch)
    own = getattr(output, "loss", None)
    if not isinstance(own, Tensor) or own.numel() != 1:
        given = "no loss" if own is None else f"{own!r} as its loss"
        raise AdapeftError(
            f"{_name(model)} returns {given} for a batch with labels, so the measured loss ({objective.summary}) "
            f"cannot be checked. Make its forward return the loss that it is trained with."
        )
    if not are_alike(logits, objective.logits_in(output)):
        if not are_alike(logits, logits_of(objective, batch, model)):
            raise AdapeftError(
                f"{_name(model)} computes different logits each time for the same batch, even in evaluation mode, so "
                f"measurements would not be reproducible. Fix its random seed, such as config.hash_seed of Reformer."
            )
        raise AdapeftError(
            f"{_name(model)} computes different logits with labels than without. Add to the batches the inputs that "
            "it derives from the labels, such as decoder_input_ids."
        )
    logits = objective.logits_in(output)
    ours = float(objective.loss_sum(logits, labels)) / objective.num_predictions(labels)
    if math.isfinite(ours) and not abs(float(own) - ours) <= _tolerance(own.dtype, ours, logits):
        raise AdapeftError(
            f"the loss that {_name(model)} computes for the first batch is {float(own):.6g}, but the loss that would "
            f"be measured ({objective.summary}) is {ours:.6g}. {_REMEDY}"
        )


@torch.no_grad()
def check_padding(objective: Objective, alone: Batch, batched: Batch, model: nn.Module) -> None:
    """Check that padding does not change the logits of an example. Runs the model twice.

    Fourier transforms over the tokens (FNet) and convolutions without a mask (ConvBERT) depend on the padding.

    Args:
        objective: objective of the measurement.
        alone: batch of one example.
        batched: batch of the same example first, and a longer one.
        model: model, or an engine around it, in evaluation mode. Under ZeRO every rank must pass the same batches.

    Raises:
        AdapeftError: the logits differ by more than rounding.
    """
    if objective.reads_images:
        return
    length, padded_length = (batch.inputs["input_ids"].shape[-1] for batch in (alone, batched))
    if length == padded_length:
        return
    by_itself, padded = (logits_of(objective, batch, model)[0] for batch in (alone, batched))
    if by_itself.ndim == 2:  # logits of tokens
        padded = padded[objective.positions(batched)[0]]
    if not are_alike(by_itself, padded):
        difference = float((by_itself - padded).abs().max())
        raise AdapeftError(
            f"data.padding = longest: {_name(model)} computes different logits for an example of {length} tokens "
            f"when it is padded to {padded_length} (by up to {difference:.3g}), so its results would depend on "
            "the other examples in the batch. Set data.padding: max_length."
        )


@torch.no_grad()
def check_packing(objective: Objective, alone: Sequence[Batch], packed: Batch, model: nn.Module) -> None:
    """Check that a packed example has the logits that it has alone. Runs the model once more than there are examples.

    State-space models and convolutions pass on what they have read, and models that count positions by themselves do
    not start again.

    Args:
        objective: objective of the measurement.
        alone: batches of one example each.
        packed: batch of the same examples.
        model: model, or an engine around it, in evaluation mode. Under ZeRO every rank must pass the same batches.

    Raises:
        AdapeftError: the model does not take positions, or logits differ by more than rounding.
    """
    try:
        logits = logits_of(objective, packed, model)
    except TypeError as error:
        raise AdapeftError(
            f"data.packing = true: {_name(model)} cannot be told where an example begins ({error}). Set data.packing: "
            "false."
        ) from error
    assert packed.example_of is not None
    for place, batch in enumerate(alone):
        by_itself, beside = logits_of(objective, batch, model)[0], logits[packed.example_of == place]
        if not are_alike(by_itself, beside):
            raise AdapeftError(
                f"data.packing = true: {_name(model)} computes different logits for an example next to others (by up "
                f"to {float((by_itself - beside).abs().max()):.3g}), as if it had read them too. Set data.packing: "
                "false."
            )


def logits_of(objective: Objective, batch: Batch, model: nn.Module) -> Tensor:
    """Return the logits of ``batch``.

    Raises:
        AdapeftError: the model returns no logits, or their shape does not fit the objective.
    """
    try:
        logits = objective.forward(model, batch)
    except AttributeError as error:
        if error.name not in objective.output_names:
            raise
        raise AdapeftError(_no_logits(_name(model), error.name, error.obj)) from error
    if not isinstance(logits, Tensor) or not objective.fits(logits, batch.labels):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise AdapeftError(
            f"{_name(model)} returns logits of shape {shape} for labels of shape {list(batch.labels.shape)}, which do "
            f"not fit the loss ({objective.summary})."
        )
    return logits


def _with_labels(objective: Objective, model: nn.Module, batch: Batch) -> Any:
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        with naming_examples(batch):
            return model(**batch.inputs, **objective.label_inputs(batch.labels))
    except AdapeftError:
        raise
    except (TypeError, ValueError) as error:
        raise AdapeftError(
            f"{_name(model)} fails to compute its loss for the first batch, whose labels have shape "
            f"{list(batch.labels.shape)} and type {str(batch.labels.dtype).removeprefix('torch.')}: {error}"
        ) from error
    finally:
        if config is not None and getattr(config, "problem_type", None) != problem:
            config.problem_type = problem  # transformers writes the type that it infers to the config


def are_alike(logits: Tensor, others: Tensor) -> bool:
    """Whether logits are equal up to differences between kernels, which a model may choose depending on labels."""
    if logits.shape != others.shape:
        return False
    difference, norm = 0.0, 0.0
    for piece, other in zip(rows_in_double(logits), rows_in_double(others), strict=True):
        finite = piece.isfinite() & other.isfinite()
        difference += float(torch.where(finite, piece - other, 0).double().square().sum())
        norm += float(torch.where(finite, piece, 0).double().square().sum())
    return difference <= torch.finfo(logits.dtype).eps * norm


def _tolerance(dtype: torch.dtype, loss: float, logits: Tensor) -> float:
    """Return the rounding tolerance of a mean loss that was computed in ``dtype``.

    Each term is a difference of numbers as large as the logits, which every kernel accumulates in at least float32.
    """
    largest = float(logits.amax(-1).double().abs().mean())
    eps = torch.finfo(dtype).eps
    return _ROUNDINGS * (eps * abs(loss) + min(eps, torch.finfo(torch.float32).eps) * largest)


def _name(model: nn.Module) -> str:
    return type(getattr(model, "module", model)).__name__


def _no_logits(name: str, field: str, output: Any) -> str:
    """Return the error message for an output without an attribute ``field`` that holds logits."""
    if isinstance(output, tuple) or (type(output) is dict and field in output):
        return (
            f"{name} returns a {type(output).__name__}, whose values cannot be read as attributes: set "
            f"model.config.return_dict = True, or make its forward return a transformers ModelOutput with loss and "
            f"{field}."
        )
    found = ", ".join(map(repr, output)) if hasattr(output, "keys") else f"a {type(output).__name__}"
    return f"{name} returns no {field}, only {found}, so it cannot be measured. Give its loss as a function, loss=."

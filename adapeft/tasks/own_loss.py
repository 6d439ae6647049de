"""What the model computes by itself: the loss that is measured, and one example whatever is batched with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.errors import AdapeftError
from adapeft.tasks.objective import Objective

_ROUNDINGS = 4
"""Of a mean cross-entropy. On a CPU the largest of 1 to 4,000 predictions in any precision was 1.3."""

_REMEDY = (
    "Usual reasons: config.output_router_logits adds a mixture of experts' auxiliary loss; class weights or label "
    "smoothing change it; several tasks are added up; or the labels are shifted twice, or not at all, on their way to "
    "a language model. Switch that off for measuring, or give a model and batches of one of the losses that are known."
)


@torch.no_grad()
def check_own_loss(objective: Objective, batch: Batch, model: nn.Module) -> None:
    """Checks that the model's own mean loss of ``batch`` is the objective's. Runs the model twice, and once more to say
    why the logits differ.

    They are equal up to the rounding of the precision in which the model computes its loss; what is not finite is not
    compared.

    Args:
        objective: of the measurement.
        batch: with at least one prediction, its labels within the model's outputs.
        model: or an engine around it, in evaluation mode. Under ZeRO every rank gives the same batch.

    Raises:
        AdapeftError: the model gives no loss or no logits, logits of other shapes, or another loss.
    """
    labels = batch.labels
    logits = logits_of(objective, batch, model)
    output = _with_labels(model, batch)
    own = getattr(output, "loss", None)
    if not isinstance(own, Tensor) or own.numel() != 1:
        given = "no loss" if own is None else f"{own!r} as its loss"
        raise AdapeftError(
            f"{_name(model)} returns {given} for a batch with labels, so there is nothing to compare what would be "
            f"measured with ({objective.summary}). Let its forward return the loss that it is trained with."
        )
    if not _are_alike(logits, output.logits):
        if not _are_alike(logits, logits_of(objective, batch, model)):
            raise AdapeftError(
                f"{_name(model)} computes other logits each time it is given the same batch, in evaluation mode too, "
                f"so no measurement of it could be repeated. Fix what it draws at random, such as config.hash_seed of "
                f"Reformer."
            )
        raise AdapeftError(
            f"{_name(model)} computes other logits when it is given labels than without them. Add to the batches "
            "whatever it derives from the labels, such as decoder_input_ids."
        )
    ours = float(objective.loss_sum(output.logits, labels)) / objective.num_predictions(labels)
    if math.isfinite(ours) and not abs(float(own) - ours) <= _tolerance(own.dtype, ours, output.logits):
        raise AdapeftError(
            f"the loss that {_name(model)} computes of the first batch is {float(own):.6g}, but what would be measured "
            f"({objective.summary}) is {ours:.6g}. {_REMEDY}"
        )


@torch.no_grad()
def check_padding(objective: Objective, alone: Batch, batched: Batch, model: nn.Module) -> None:
    """Checks that padding does not change the logits of an example. Runs the model twice.

    Fourier transforms over the tokens (FNet) and convolutions without a mask (ConvBERT) read what the padding holds.

    Args:
        objective: of the measurement.
        alone: one example.
        batched: the same example first, and a longer one.
        model: or an engine around it, in evaluation mode. Under ZeRO every rank gives the same batches.

    Raises:
        AdapeftError: the logits differ by more than rounding.
    """
    length, padded_length = (batch.inputs["input_ids"].shape[1] for batch in (alone, batched))
    if length == padded_length:
        return
    by_itself, padded = (logits_of(objective, batch, model)[0] for batch in (alone, batched))
    if not _are_alike(by_itself, padded):
        difference = float((by_itself - padded).abs().max())
        raise AdapeftError(
            f"data.padding = longest: {_name(model)} computes other logits for an example of {length} tokens "
            f"when it is padded to {padded_length} (by up to {difference:.3g}), so its results would depend on "
            "what stands in the same batch. Set data.padding: max_length."
        )


def logits_of(objective: Objective, batch: Batch, model: nn.Module) -> Tensor:
    """The logits of ``batch``.

    Raises:
        AdapeftError: there are none, or they have other shapes than the objective's.
    """
    try:
        logits = objective.forward(model, batch)
    except AttributeError as error:
        if error.name != "logits":
            raise
        raise AdapeftError(_no_logits(_name(model), error.obj)) from error
    if not isinstance(logits, Tensor) or not objective.fits(logits, batch.labels):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise AdapeftError(
            f"{_name(model)} gives logits of shape {shape} for labels of shape {list(batch.labels.shape)}, which do "
            f"not fit a {objective.summary}."
        )
    return logits


def _with_labels(model: nn.Module, batch: Batch) -> Any:
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        with naming_examples(batch):
            return model(**batch.inputs, labels=batch.labels)
    except AdapeftError:
        raise
    except (TypeError, ValueError) as error:
        raise AdapeftError(
            f"{_name(model)} fails to compute its loss of the first batch, whose labels have the shape "
            f"{list(batch.labels.shape)} and type {str(batch.labels.dtype).removeprefix('torch.')}: {error}"
        ) from error
    finally:
        if config is not None and getattr(config, "problem_type", None) != problem:
            config.problem_type = problem  # transformers writes what it guesses into the config


def _are_alike(logits: Tensor, others: Tensor) -> bool:
    """Equal but for other kernels, which a model may choose when it is given labels."""
    if logits.shape != others.shape:
        return False
    finite = logits.isfinite() & others.isfinite()
    differences = torch.where(finite, logits - others, 0).double().norm()
    return bool(differences <= torch.finfo(logits.dtype).eps ** 0.5 * torch.where(finite, logits, 0).double().norm())


def _tolerance(dtype: torch.dtype, loss: float, logits: Tensor) -> float:
    """Rounding of a mean loss that was computed in ``dtype``.

    A term is the difference of numbers as large as the logits, which every kernel adds in float32 at least.
    """
    largest = float(logits.amax(-1).double().abs().mean())
    eps = torch.finfo(dtype).eps
    return _ROUNDINGS * (eps * abs(loss) + min(eps, torch.finfo(torch.float32).eps) * largest)


def _name(model: nn.Module) -> str:
    return type(getattr(model, "module", model)).__name__


def _no_logits(name: str, output: Any) -> str:
    """What to say of an output without an attribute ``logits``."""
    if isinstance(output, tuple) or (type(output) is dict and "logits" in output):
        return (
            f"{name} returns a {type(output).__name__}, whose values have no names that can be read as attributes: set "
            f"model.config.return_dict = True, or let its forward return a ModelOutput of transformers with loss and "
            f"logits."
        )
    found = ", ".join(map(repr, output)) if hasattr(output, "keys") else f"a {type(output).__name__}"
    return f"{name} returns no logits, only {found}: it cannot be measured."

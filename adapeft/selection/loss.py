"""The loss that ``adapeft.select`` measures: the model's own, that of a task by name, or a function of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.measure.mode import measuring_mode
from adapeft.methods.registry import Method
from adapeft.sections.select import Select
from adapeft.selection.batches import as_batches, batches_of_function, check_labels
from adapeft.tasks.inference import infer_objective, objective_named
from adapeft.tasks.losses.function import FunctionLoss, LossFunction
from adapeft.tasks.losses.objective import MeanLoss, Objective
from adapeft.tasks.losses.own_loss import check_own_loss


def measured_loss(
    loss: str | LossFunction | None,
    batches: Iterable[Mapping[str, Any]],
    model: nn.Module,
    method: Method[Any],
    settings: Select,
) -> tuple[MeanLoss, list[Batch]]:
    """Return the loss to measure and the batches on the device of ``model``.

    Raises:
        AdapeftError: the loss or a batch is invalid, or the method needs more of the loss than a function gives.
    """
    if callable(loss):
        function = FunctionLoss(loss)
        _check_suffices(function, method, settings)
        with measuring_mode(model, restore=()):
            return function, batches_of_function(function, batches, model)
    if loss is not None and not isinstance(loss, str):
        raise AdapeftError(f"loss = {loss!r}: give the name of a task, or a function of the model and a batch.")
    given = as_batches(batches, model)
    labels = given[0].labels
    return infer_objective(model, labels) if loss is None else objective_named(loss, model, labels), given


def check_loss(objective: MeanLoss, batches: Sequence[Batch], model: nn.Module, *, is_own: bool, samples: bool) -> None:
    """Check the labels, or the draws of a function, and the model's own loss if that is the one to measure.

    Args:
        objective: loss from ``measured_loss``.
        batches: its batches.
        model: model in measuring mode.
        is_own: whether the loss was inferred from the model.
        samples: whether labels are sampled from the model.

    Raises:
        AdapeftError: a label is invalid, the function draws no labels, or the model computes another loss.
    """
    counted = [batch for batch in batches if objective.num_predictions(batch.labels)]
    if isinstance(objective, Objective):
        check_labels(objective, batches, model)
        for batch in counted[:1]:  # a whole batch, because a weighted mean of one example is a plain mean
            if is_own:
                check_own_loss(objective, batch, model)
    elif isinstance(objective, FunctionLoss) and samples:
        for batch in counted[:1]:
            objective.check_samples(model, batch)


def _check_suffices(loss: FunctionLoss, method: Method[Any], settings: Select) -> None:
    if method.measures_examples:
        raise AdapeftError(
            f"select.method = {method.name} measures example by example, which a function as loss= does not tell "
            f"apart. Use another method, or the name of a task as loss=."
        )
    if method.samples_labels(settings) and not loss.can_sample:
        raise AdapeftError(
            f"select.method = {method.name} measures curvature at labels that are drawn from the model, which the "
            f"function loss= does not offer. Give it a third parameter, loss(model, batch, generator=None), with which "
            f"it draws the labels (see 'Another loss' in adapeft/README.md); or measure curvature from losses "
            f"with groups='tensor', curvature='parabola'; or use a method without curvature, such as snip or sam."
        )

"""``adapeft.select``: measure and choose in one process, on batches of the caller."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from adapeft.config.load import parse_select
from adapeft.data.batches import Calibration
from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.measure.groups import groups_of
from adapeft.measure.influence import reach_of
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.measure import check_precision, measure, not_reached
from adapeft.measure.mode import measuring_mode
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.lora.method import least_lora
from adapeft.methods.registry import get_method
from adapeft.model.wrappers import ATTACHMENT, bare
from adapeft.sections.budget import DEFAULT_BUDGET
from adapeft.selection.batches import examples_of
from adapeft.selection.choose import check_budget, choose, judged
from adapeft.selection.loss import check_loss, measured_loss
from adapeft.subset.empty import check_not_empty
from adapeft.subset.subset import Subset
from adapeft.subset.verdict import is_drawn_for_noise
from adapeft.tasks.losses.cross_entropy import TokenCrossEntropy
from adapeft.tasks.losses.function import LossFunction
from adapeft.tasks.losses.objective import MeanLoss

_OF_THE_COMMAND = {"calibration", "batch_size", "micro_batch_size", "statistics", "memory_per_device"}

_CALLER = 3
"""Level of the stack at which warnings are shown: below ``select`` is torch's decorator."""


@torch.enable_grad()
def select(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    budget: str | float | int = str(DEFAULT_BUDGET),
    loss: str | LossFunction | None = None,
    learning_rate: float = 1e-3,
    num_steps: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Subset:
    """Measure ``model`` on ``batches`` and choose the subset to train within ``budget``.

    Args:
        model: a transformers model, which may be compiled or wrapped in DistributedDataParallel; its weights are
            restored before this returns.
        batches: batches as a DataLoader of the Trainer yields them: mappings of the model's inputs and ``labels``. 16
            to 64 batches of about 16 examples suffice. The first half gives the direction, the second half the gain
            along it.
        budget: fraction (``"0.5%"``) or count of the base model's parameters.
        loss: loss to measure. None: the model's own, for ``labels`` or ``start_positions`` and ``end_positions``. The
            name of a task, such as ``"token-classification"``: the plain loss of that task, which the model need not
            compute itself. A function ``loss(model, batch, generator=None)`` of a batch as it was given, which returns
            the terms [T] whose mean is the loss, one per label that counts; with a ``torch.Generator``, at labels that
            it draws with it from the model's own distribution instead of the true ones. Without that parameter, only
            methods that sample no labels can measure it, and it may also return a scalar, which counts as one term.
        learning_rate: learning rate of the planned training, whose reach limits the influence.
        num_steps: number of steps of the planned training.
        seed: random seed of sampled labels and draws.
        options: keys of the config's ``select`` section (``method``, ``groups``, ``include``, ``reach`` …), except
            those that specify how a command batches its calibration, which ``batches`` replace.

    Raises:
        AdapeftError: there are fewer than two batches with a prediction, the model or the method cannot use an input
            or label, the loss is not the model's own, an option or the budget is invalid, or the model is sharded, has
            layers of PEFT, or has a subset attached.
    """
    model = bare(model, "select")
    if hasattr(model, ATTACHMENT):
        raise AdapeftError(
            "this model has a subset attached, whose leaves cannot be candidates. Call adapeft.detach(model) first."
        )
    for option in sorted(_OF_THE_COMMAND & options.keys()):
        raise AdapeftError(
            f"select.{option} = {options[option]!r} applies only to commands. In adapeft.select the batches determine "
            f"it: leave it out."
        )
    settings = parse_select({"budget": budget, **options})
    method = get_method(settings.method)
    objective, given = measured_loss(loss, batches, model, method, settings)
    examples = examples_of(given, method.name) if method.measures_examples else given
    groups = groups_of(model, settings)
    check_budget(groups, settings)
    candidates = [info.name for info in groups.parameters]
    check_precision(settings, next(model.parameters()).dtype)
    displaced = candidates if settings.displacing else []
    with (
        measuring_mode(model, restore=[*groups.always_train, *displaced]),
        seen(model, groups, method.window_rank(groups, settings), seed) as view,
    ):
        shards = view.shards(WholeModel(model, view.names, groups.always_train))
        if method.measures_loss:
            samples = method.samples_labels(settings)
            check_loss(objective, given, model, is_own=loss is None, samples=samples)
        passes = Passes(
            shards,
            objective,
            _calibration(objective, examples),
            lambda indices: examples[int(indices[0])],
            seed,
            source="the batches, each taken as one example" if callable(loss) else "the batches",
        )
        statistics = measure(method, passes, groups, settings)
        reach = reach_of(settings, learning_rate * num_steps, num_steps)
        subset = choose(settings, statistics, reach=reach, seed=seed, ranks=shards.ranks)
        subset = judged(subset, passes, statistics.groups, settings, seed)
        if isinstance(objective, TokenCrossEntropy):
            subset = subset.described(lora_from=least_lora(statistics.groups))
    if statistics.groups.unreached:
        warnings.warn(f"adapeft.select: {not_reached(statistics.groups.unreached)}.", stacklevel=_CALLER)
    if is_drawn_for_noise(subset.choice):
        warnings.warn(
            f"adapeft.select: the slopes are mostly noise (reliability {subset.choice.reliability:.2f} of 1), so a "
            "random draw of the budget was taken. Pass more batches, or fill=False to train what is chosen.",
            stacklevel=_CALLER,
        )
    check_not_empty(subset)
    return subset


def _calibration(objective: MeanLoss, examples: Sequence[Batch]) -> Calibration:
    """Return the two halves of the examples that contain a prediction, one example (or batch) per calibration batch."""
    order = [np.array([index]) for index, batch in enumerate(examples) if objective.num_predictions(batch.labels)]
    middle = len(order) // 2
    return Calibration(tuple(order[:middle]), tuple(order[middle:]))

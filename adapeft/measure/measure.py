"""Measurement of a method's statistics, with checks of the calibration and of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from adapeft.data.batches import Calibration
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.measure.unreached import check_reached
from adapeft.ranks import Ranks
from adapeft.tasks.losses.objective import IGNORED

if TYPE_CHECKING:
    from adapeft.sections.select import Select


class Measurement(Protocol):
    """Interface of a method that measuring uses; see ``adapeft.methods.base.method.Method``."""

    default_warmup_steps: int
    measures_loss: bool

    def measure(self, passes: Passes, groups: Groups, settings: Select) -> Statistics:
        """Return the statistics of the groups. Collective."""
        ...


def measure(method: Measurement, passes: Passes, groups: Groups, settings: Select) -> Statistics:
    """Return the method's statistics of ``groups``, all finite. Collective.

    Warm-ups and the probe change the always-trained parameters; the caller restores them or discards the model.

    For every method, parameters that get no gradient from any batch of the calibration are removed from the groups:
    a pooler that the task does not use, or a module that computes without gradients, might be chosen but never trained.

    Raises:
        AdapeftError: no candidate gets a gradient, or a loss, a sum over batches or a statistic is not finite.
    """
    passes = ready(method, passes, groups, settings)
    found = method.measure(passes, groups, settings)
    check_measured(found, settings, passes.shards.ranks)
    unreached = passes.unreached()
    check_reached(groups, unreached)
    return found.without(unreached)


def check_measured(statistics: Statistics, settings: Select, ranks: Ranks) -> None:
    """Check that all measured statistics are finite. Collective; see ``Statistics.check_finite``."""
    statistics.check_finite(
        f"measuring for select.method = {settings.method}",
        "The base model's weights are not finite there, or its gradients are too large for float32. Check the base "
        "model and the scale of the targets.",
        ranks,
    )


def not_reached(names: Sequence[str]) -> str:
    """Return the message about parameters that were left out of the groups."""
    return f"left out, because no calibration batch gives them a gradient: {', '.join(names)}"


def check_precision(settings: Select, dtype: torch.dtype) -> None:
    """Check that ``dtype`` is precise enough for the small displacements of weights that ``settings`` require.

    Raises:
        AdapeftError: it would round them away.
    """
    if settings.displacing and dtype not in (torch.float32, torch.float64):
        raise AdapeftError(
            f"model.dtype = {str(dtype).removeprefix('torch.')} is too coarse for the small displacements of weights "
            f"that select.{settings.displacing} makes. Set model.dtype: float32, or do not use that option."
        )


def ready(method: Measurement, passes: Passes, groups: Groups, settings: Select) -> Passes:
    """Return ``passes`` with the warm-up that ``method`` needs, over the batches that contain a prediction.

    Raises:
        AdapeftError: a half of the calibration contains no prediction.
    """
    steps = method.default_warmup_steps if settings.warmup_steps == "auto" else settings.warmup_steps
    passes = replace(passes, warmup_steps=steps if groups.always_train else 0)
    return replace(passes, calibration=_with_predictions(passes)) if method.measures_loss else passes


def _with_predictions(passes: Passes) -> Calibration:
    """Return the calibration without global batches that contain no prediction, which have no weight in any mean."""

    def counted(name: str, half: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        found = passes.predicting(half)
        if not found:
            raise AdapeftError(
                f"half {name} of the calibration contains no prediction: every label of its {len(half)} batches is "
                f"{IGNORED}. Each half needs at least one. Provide more batches with labels (in a config, raise "
                "select.calibration), and check that truncating texts to the maximum length leaves some labels."
            )
        return found

    return Calibration(counted("A", passes.calibration.half_a), counted("B", passes.calibration.half_b))

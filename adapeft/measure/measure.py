"""Measuring: the method's passes, at one point or along a probe."""

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
from adapeft.tasks.objective import IGNORED

if TYPE_CHECKING:
    from adapeft.sections.select import Select


class Measurement(Protocol):
    """What measuring needs to know of a method; see ``adapeft.methods.base.method.Method``."""

    default_warmup_steps: int
    measures_loss: bool

    def measure(self, passes: Passes, groups: Groups, settings: Select) -> Statistics:
        """Statistics of the groups. Collective."""
        ...


def measure(method: Measurement, passes: Passes, groups: Groups, settings: Select) -> Statistics:
    """The method's statistics of ``groups``, all finite. Collective.

    Warm-ups and probe move the always-trained parameters; whoever owns the model puts them back or drops the model.

    What no batch of the calibration reaches is no longer among the groups, whatever the method: a pooler that the task
    does not use, or a module that computes without gradients, would be chosen and never train.

    Raises:
        AdapeftError: the calibration reaches no candidate, or a loss, a sum over batches or a statistic is not finite.
    """
    passes = ready(method, passes, groups, settings)
    found = method.measure(passes, groups, settings)
    found.check_finite(
        f"measuring for select.method = {settings.method}",
        "The weights of the base are not finite there, or its gradients are too large for float32: check the base, and "
        "the scale of the targets.",
        passes.shards.ranks,
    )
    unreached = passes.unreached()
    if set(unreached) >= {info.name for info in groups.parameters}:
        raise AdapeftError(
            f"none of the {len(groups.parameters)} candidates received a gradient from the calibration, such as "
            f"{groups.parameters[0].name!r}: the loss does not depend on them. Widen select.include and select.exclude."
        )
    return found.without(unreached)


def not_reached(names: Sequence[str]) -> str:
    """What to say of the parameters that were left out of the groups."""
    return f"left out, because no calibration batch gives them a gradient: {', '.join(names)}"


def check_precision(settings: Select, dtype: torch.dtype) -> None:
    """Checks that weights of ``dtype`` can be moved as finely as ``settings`` ask for.

    Raises:
        AdapeftError: they cannot.
    """
    if settings.displacing and dtype not in (torch.float32, torch.float64):
        raise AdapeftError(
            f"model.dtype = {str(dtype).removeprefix('torch.')} rounds away the small moves of the weights that "
            f"select.{settings.displacing} makes. Take model.dtype: float32 or leave that out."
        )


def ready(method: Measurement, passes: Passes, groups: Groups, settings: Select) -> Passes:
    """``passes`` with the warm-up that ``method`` needs, over the batches that hold a prediction.

    Raises:
        AdapeftError: a half of the calibration holds none.
    """
    steps = method.default_warmup_steps if settings.warmup_steps == "auto" else settings.warmup_steps
    passes = replace(passes, warmup_steps=steps if groups.always_train else 0)
    return replace(passes, calibration=_with_predictions(passes)) if method.measures_loss else passes


def _with_predictions(passes: Passes) -> Calibration:
    """The calibration without the global batches that hold no prediction: they have no weight in any mean."""

    def counted(name: str, half: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        objective, collate = passes.objective, passes.collate
        found = tuple(batch for batch in half if objective.num_predictions(collate(batch).labels))
        if not found:
            raise AdapeftError(
                f"half {name} of the calibration holds no prediction: every label of its {len(half)} batches is "
                f"{IGNORED}. Each half needs one: give more batches with labels (in a config, raise "
                "select.calibration), and check that cutting texts to the maximum length leaves some."
            )
        return found

    return Calibration(counted("A", passes.calibration.half_a), counted("B", passes.calibration.half_b))

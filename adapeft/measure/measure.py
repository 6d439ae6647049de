"""Measuring, top to bottom: warm up the always-trained part, then the method's passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.probe import measure_along_probe
from adapeft.measure.statistics import Statistics

if TYPE_CHECKING:
    from adapeft.config import Select
    from adapeft.methods import Method

WARMUP_LEARNING_RATE = 3e-3
"""Peak of AdamW's learning rate for the always-trained part.

A head that has not yet learned how frequent the classes are puts that into every layer's gradient. Measured on CoLA
(MiniLM, 512 examples): after 32 steps at a constant 1e-3 the pooler took 72 % of the budget for a promised decrease of
0.15; after 96 falling from 3e-3 it took nothing, and the promise was 0.0045. Both warmed up over the whole calibration;
over half A alone, as now, 81 % of the large tensors have a positive slope there instead of 5 %.
"""


def measure(method: Method, passes: Passes, groups: Groups, settings: Select) -> Statistics:
    """The method's statistics of ``groups``. Collective.

    Warm-up and probe move the always-trained parameters; whoever owns the model puts them back or drops the model.
    """
    warm_up(method, passes, groups, settings)
    if settings.probe_steps:
        return measure_along_probe(passes, groups, settings, lambda: method.measure(passes, groups, settings))
    return method.measure(passes, groups, settings)


def check_precision(settings: Select, dtype: torch.dtype) -> None:
    """Checks that weights of ``dtype`` can be moved as finely as ``settings`` ask for.

    Raises:
        AdapeftError: they cannot.
    """
    if settings.displaces_weights and dtype not in (torch.float32, torch.float64):
        raise AdapeftError(
            f"model.dtype = {str(dtype).removeprefix('torch.')} rounds away the small moves of the weights that "
            f"{_displacing(settings)} makes. Take model.dtype: float32 or leave that out."
        )


def _displacing(settings: Select) -> str:
    return f"select.probe_steps = {settings.probe_steps}" if settings.probe_steps else "select.curvature = parabola"


def warm_up(method: Method, passes: Passes, groups: Groups, settings: Select) -> None:
    """Trains the always-trained part for as long as the settings say, or the method asks for. Collective."""
    steps = method.default_warmup_steps if settings.warmup_steps == "auto" else settings.warmup_steps
    if groups.always_train:
        passes.warm_up(steps, WARMUP_LEARNING_RATE)

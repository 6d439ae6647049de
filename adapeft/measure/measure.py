"""Measuring: the method's passes, at one point or along a probe."""

from __future__ import annotations

from dataclasses import replace
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


def measure(method: Method, passes: Passes, groups: Groups, settings: Select) -> Statistics:
    """The method's statistics of ``groups``. Collective.

    Warm-ups and probe move the always-trained parameters; whoever owns the model puts them back or drops the model.
    """
    passes = with_warm_up(method, passes, groups, settings)
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


def with_warm_up(method: Method, passes: Passes, groups: Groups, settings: Select) -> Passes:
    """``passes`` that warm the always-trained part up for as long as the settings say, or the method asks for."""
    steps = method.default_warmup_steps if settings.warmup_steps == "auto" else settings.warmup_steps
    return replace(passes, warmup_steps=steps if groups.always_train else 0)

"""What a run has measured of its groups, and the loss decrease that its choice predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adapeft.choose.elements import without_draw
from adapeft.files.artifact import load_table
from adapeft.measure.storage import TABLE, load_groups
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.subset.choice import Choice, in_one_step
from adapeft.subset.subset import Subset
from adapeft.subset.verdict import is_drawn_for_noise
from cluster.output.folder import RunFolder


class MeasuredGroups(NamedTuple):
    """Columns over the groups of a run.

    Attributes:
        names: parameter of each group; None if groups have several tensors.
        indices: index of each group within its parameter, -1 for the whole of it. int64 [K].
        influence: influence of each group. float64 [K].
        slopes: slope of each group along its direction; None if there is none, or one per point of a probe. [K].
        slope_errors: standard error of each slope, NaN where it is unknown; None without slopes. [K].
    """

    names: list[str] | None
    indices: np.ndarray
    influence: np.ndarray
    slopes: np.ndarray | None
    slope_errors: np.ndarray | None


def measured_of(folder: RunFolder) -> MeasuredGroups | None:
    """Return what the run has measured of its groups; None if it has not valued any."""
    path = folder.path / TABLE
    if not path.is_file():
        return None
    table = load_table(path)
    if "influence" not in table.column_names:
        return None
    _, columns, _ = load_groups(folder.path)
    # A group of several tensors has no parameter.
    names = table["parameter"].to_pylist() if table["parameter"].null_count == 0 else None
    has_slopes = {"slope", "slope_error"} <= columns.keys() and columns["slope"].ndim == 1
    slopes, errors = (columns["slope"], columns["slope_error"]) if has_slopes else (None, None)
    return MeasuredGroups(names, table["index"].to_numpy(), table["influence"].to_numpy(), slopes, errors)


def chosen_of(folder: RunFolder, subset: Subset) -> Subset | None:
    """Return what a run has chosen of its subset, without the draw that filled it up; None if that is unknown."""
    if not subset.choice.num_drawn:
        return subset
    return without_draw(load_groups(folder.path)[0], subset) if (folder.path / TABLE).is_file() else None


def one_by_one(influence: np.ndarray, choice: Choice) -> str | None:
    """Return how far the influence of groups is from what they promise together; None if the choice adds it up.

    Args:
        influence: influence of each group. [K].
        choice: choice of the run.
    """
    if is_drawn_for_noise(choice):
        return "A random draw was taken, because the slopes are mostly noise, and so is what they promise."
    if choice.value is None or choice.adds_up:
        return None
    total = influence[influence > 0].sum()
    which = "all" if choice.unspent or choice.num_drawn else "the chosen ones"
    return (
        f"{str(choice.granularity).capitalize()}s are counted one by one, although many change the outputs alike: "
        f"their sum would be a loss decrease of {total:,.4g}, but {which} together promise {choice.value:.3g}."
    )


def unit_of(choice: Choice) -> str:
    """Return what the values of groups are to the method of a choice."""
    return "predicted loss decrease" if _predicts(choice) else f"value to the method {choice.method}"


class PredictedDecrease(NamedTuple):
    """The loss decrease that a choice predicts.

    Attributes:
        value: the value of the choice.
        adds_up: whether it is the sum over groups, each as if trained alone.
        at_once: of a sum, the decrease along all directions of the groups at once; None if it is unknown.
    """

    value: float
    adds_up: bool
    at_once: float | None

    @property
    def text(self) -> str:
        """The prediction in a few words."""
        summed = ", summed over groups" if self.adds_up else ""
        return f"{self.value:.3g} predicted{summed}{in_one_step(self.at_once)}"


def predicted_decrease(choice: Choice, metrics: Mapping[str, Any]) -> PredictedDecrease | None:
    """Return the loss decrease that the choice predicts for the training of its run; None if it predicts another one.

    The influence is the decrease beyond that of what is always trained, in the training that the choice was made for.

    Args:
        choice: choice of the subset.
        metrics: content of ``metrics.json`` of the trained run.
    """
    is_of_this_run = choice.source is None and not metrics["always_trained_parameters"] and "num_steps" in metrics
    is_planned = choice.reach not in (None, "inf", math.inf)
    if not (choice.value and _predicts(choice) and is_of_this_run and is_planned):
        return None
    return PredictedDecrease(choice.value, choice.adds_up, choice.joint_value)


def _predicts(choice: Choice) -> bool:
    return choice.method == AdaPEFTOptions.model_fields["method"].default

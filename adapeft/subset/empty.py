"""The empty choice: no candidate promises a lower loss, which is a valid result of every solver."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapeft.errors import AdapeftError
from adapeft.subset.subset import Subset

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING = "nothing to train"
"""Start of the message about an empty choice."""


def or_random(subset: Subset, draw: Callable[[], Subset]) -> Subset:
    """Return ``subset``, or if it is empty, the random draw with which ``select.if_empty: random`` replaces it.

    Args:
        subset: the choice, without always-trained parameters.
        draw: function that draws a subset of the same budget and granularity.
    """
    if subset.count:
        return subset
    # There is no prediction for the drawn groups; the zeros belong to the empty choice.
    empty = subset.choice.with_values(value=None, bound=None, gap=None, unspent=None)
    drawn = draw()
    return replace(drawn, choice=empty.with_values(**drawn.choice.recorded(), drawn_for_empty_choice=True))


def check_not_empty(subset: Subset) -> None:
    """Check that there is something to train.

    Raises:
        AdapeftError: nothing was chosen, and nothing is trained outside the budget.
    """
    # Not subset.count: a part that does not fit its layer cannot be counted; attach refuses it with its name.
    if not subset.always_train and all(part.is_empty for part in subset.parts.values()):
        raise AdapeftError(
            f"{NOTHING}: {reason(subset)}, and no parameter is trained outside the budget (select.always_train). "
            "Measure on more or different examples, raise select.budget, widen select.include, or set "
            "select.if_empty: random to train a random draw of the same budget."
        )


def announcement(subset: Subset) -> str | None:
    """Return a message about an empty choice that is trained nevertheless, or None if the choice is not empty."""
    if subset.choice.drawn_for_empty_choice:
        return (
            "nothing chosen: no candidate promises a lower loss, so a random draw of the same budget is trained "
            "(select.if_empty: random)"
        )
    if subset.count:
        return None
    names = ", ".join(subset.always_train[:3]) + (", …" if len(subset.always_train) > 3 else "")
    return f"nothing chosen: {reason(subset)}; only the parameters of select.always_train are trained ({names})"


def reason(subset: Subset) -> str:
    """Return the reason why an empty subset is empty, according to its description."""
    choice = subset.choice
    if choice.method is None:
        return "the subset is empty"
    candidates = "no candidate"
    if choice.num_groups is not None:
        candidates = f"none of the {choice.num_groups:,} candidates (by {choice.granularity})"
    budget = "" if not choice.budget else f" within the budget of {choice.budget:,} parameters"
    return f"{choice.method} chose nothing, because {candidates} promises a lower loss{budget}"

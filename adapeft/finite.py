"""Finite: what a number has to be to count as a result. Decided here, wherever a number enters one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adapeft.errors import AdapeftError

DIVERGED = "training diverged"
"""How the message begins when training itself is at fault: other settings, such as a learning rate, may do better."""
_MOST_LISTED = 10


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if not (values.is_floating_point() or values.is_complex()):
        return True
    # A sum is finite only where all terms are, and needs no mask as large as the tensor. It may overflow itself.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], owner: str, remedy: str) -> None:
    """Checks tensors by name.

    Args:
        tensors: what is to be saved, or was read.
        owner: what they belong to, such as a path.
        remedy: a sentence.

    Raises:
        AdapeftError: names the first tensor that holds a NaN or an infinity, and how many.
    """
    for name, values in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not is_finite(values):
            bad = ~torch.isfinite(values)
            raise AdapeftError(
                f"{owner}: {name!r} holds {int(bad.sum()):,} of {values.numel():,} values that are not finite (such as "
                f"{values[bad][0].item():g}). {remedy}"
            )


def listed(examples: Iterable[int]) -> str:
    """``3, 17, 40 and 5 more``."""
    numbers = [str(example) for example in examples]
    more = f" and {len(numbers) - _MOST_LISTED} more" if len(numbers) > _MOST_LISTED else ""
    return ", ".join(numbers[:_MOST_LISTED]) + more


def blame(losses: Mapping[int, float], source: str) -> str:
    """A sentence on which examples of a batch a number that is not finite comes from.

    Args:
        losses: by the number of each example, its loss by itself.
        source: where they are from, such as ``data.train``.
    """
    bad = [example for example, loss in losses.items() if not math.isfinite(loss)]
    if not bad:
        largest = max(losses, key=lambda example: losses[example])
        return (
            f"Its examples are {listed(losses)} of {source} (counted from 0). Each has a finite loss by itself; the "
            f"largest, {losses[largest]:.3g}, is that of example {largest}."
        )
    if len(bad) == len(losses) > 1:
        return (
            f"Each of its examples has such a loss by itself ({listed(bad)} of {source}, counted from 0), so the cause "
            f"is more likely the weights, or something that all examples have in common."
        )
    return f"It comes from {'examples' if len(bad) > 1 else 'example'} {listed(bad)} of {source} (counted from 0)."

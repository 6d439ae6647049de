"""Checks that tensors and losses are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adapeft.errors import AdapeftError

DIVERGED = "training diverged"
"""Start of the message of a diverged training, which other settings, such as the learning rate, may avoid."""
_MOST_LISTED = 10


def is_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if not (values.is_floating_point() or values.is_complex()):
        return True
    # A finite sum proves finite terms without a mask as large as the tensor. The sum of finite terms may overflow.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], owner: str, remedy: str) -> None:
    """Check that all tensors are finite.

    Args:
        tensors: tensors by name.
        owner: file or object that holds them, for the message.
        remedy: last sentence of the message.

    Raises:
        AdapeftError: a tensor holds a NaN or an infinity. Names the first such tensor and counts its bad values.
    """
    for name, values in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not is_finite(values):
            bad = ~torch.isfinite(values)
            raise AdapeftError(
                f"{owner}: {name!r} holds {int(bad.sum()):,} of {values.numel():,} values that are not finite (such as "
                f"{values[bad][0].item():g}). {remedy}"
            )


def listed(examples: Iterable[int]) -> str:
    """Return the first 10 numbers as text, such as ``3, 17, 40 and 5 more``."""
    numbers = [str(example) for example in examples]
    more = f" and {len(numbers) - _MOST_LISTED} more" if len(numbers) > _MOST_LISTED else ""
    return ", ".join(numbers[:_MOST_LISTED]) + more


def blame(losses: Mapping[int, float], source: str) -> str:
    """Return a sentence that names the examples of a batch that cause a non-finite loss or gradient.

    Args:
        losses: example number → loss of this example alone.
        source: config key of the examples, such as ``data.train``.
    """
    bad = [example for example, loss in losses.items() if not math.isfinite(loss)]
    if not bad:
        largest = max(losses, key=lambda example: losses[example])
        return (
            f"Its examples are {listed(losses)} of {source} (counted from 0). Each has a finite loss by itself; the "
            f"largest is {losses[largest]:.3g}, of example {largest}."
        )
    if len(bad) == len(losses) > 1:
        return (
            f"Each of its examples has a non-finite loss by itself ({listed(bad)} of {source}, counted from 0), so the "
            f"cause is more likely the weights, or something that all examples have in common."
        )
    return f"It comes from {'examples' if len(bad) > 1 else 'example'} {listed(bad)} of {source} (counted from 0)."

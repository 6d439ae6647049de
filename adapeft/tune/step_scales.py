"""Learning rates by tensor: a step of one length changes the predictions by very different amounts."""

from __future__ import annotations

import math
from collections.abc import Mapping

_SMALLEST = 2.0**-12
"""A part that would get less is still trained."""


def step_scales(curvatures: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    r"""Parts of the learning rate by tensor, from the curvatures of their trained parts along Adam's direction.

    A step of length η in tensor t changes the predictions by :math:`η\sqrt{A_t}` (in the Fisher metric). Those whose
    change is above that of the median element's tensor are brought down to it; none is raised, because a small
    curvature is mostly noise. Down to powers of two, so that rounding in the measurement changes nothing.

    Args:
        curvatures: tensor → A_t.
        counts: tensor → trained elements.
    """
    lengths = {name: math.sqrt(max(curvature, 0.0)) for name, curvature in curvatures.items()}
    median = _weighted_median(lengths, counts)
    return {
        name: max(2.0 ** math.floor(math.log2(median / length)), _SMALLEST) if length > median > 0 else 1.0
        for name, length in lengths.items()
    }


def _weighted_median(lengths: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """The length that half of the elements are not above."""
    half, seen = sum(counts[name] for name in lengths) / 2, 0
    for name in sorted(lengths, key=lengths.__getitem__):
        seen += counts[name]
        if seen >= half:
            return lengths[name]
    return 0.0

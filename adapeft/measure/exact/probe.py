"""Measurement at several points of a short full training (the probe), instead of at its start alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import Shards
from adapeft.measure.statistics import ElementShard, Statistics


class ProbeSettings(Protocol):
    """Number of steps of the probe, number of its measured points, and its Adam learning rate."""

    probe_steps: int
    probe_points: int
    probe_learning_rate: float


def measure_along_probe(
    passes: Passes, groups: Groups, settings: ProbeSettings, measure: Callable[[], Statistics]
) -> Statistics:
    """Call ``measure`` at the ``settings.probe_points`` points of a probe and stack columns to [K, P]. Collective.

    This gives the accumulated influence (APPI) of Xu and Bu 2025, whose probe is full training for about a tenth of the
    steps. The points are evenly spaced from the start to the end of ``settings.probe_steps`` steps of Adam on all
    candidates and AdamW on the always-trained part, without dropout and at a constant learning rate. The steps use half
    A of the calibration, so that half B is still held out. During the probe, each rank keeps four numbers per element
    that it holds. Afterwards the candidates are restored bit for bit; the always-trained part keeps its last values.
    """
    shards, batches = passes.shards, passes.calibration.half_a
    start = shards.weights()
    weights = [piece.clone() for piece in start]
    # An explicit parameter group, because a rank may hold no elements.
    optimizer = torch.optim.Adam([{"params": weights}], lr=settings.probe_learning_rate)
    points: list[Statistics] = []
    due = probe_points(settings)
    for step in range(settings.probe_steps + 1):
        if step in due:
            points.append(measure())
        if step == settings.probe_steps:
            break
        with passes.training_gradients(batches[step % len(batches)], settings.probe_learning_rate) as gradients:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.to(weight.dtype)
            optimizer.step()
            optimizer.zero_grad()
        _write(shards, groups, weights)
        passes.progress("probe", step + 1, settings.probe_steps)
    _write(shards, groups, start)
    return _side_by_side(groups, points)


def probe_points(settings: ProbeSettings) -> list[int]:
    """Return the steps of the probe after which statistics are measured, including 0 and the last."""
    return np.linspace(0, settings.probe_steps, settings.probe_points).round().astype(int).tolist()


def _write(shards: Shards, groups: Groups, weights: Sequence[Tensor]) -> None:
    candidates = range(len(groups.parameters))
    shards.write(candidates, {piece.parameter: weight for piece, weight in zip(shards.slices, weights, strict=True)})


def _side_by_side(groups: Groups, points: Sequence[Statistics]) -> Statistics:
    """Stack columns [K] of P statistics to [K, P], and those of elements [n] to [n, P]."""
    elements = tuple(
        ElementShard(
            shards[0].slice,
            {name: torch.stack([shard.columns[name] for shard in shards], dim=1) for name in shards[0].columns},
        )
        for shards in zip(*(point.elements for point in points), strict=True)
    )
    columns = {name: np.stack([point.columns[name] for point in points], axis=1) for name in points[0].columns}
    return Statistics(groups, columns, elements)

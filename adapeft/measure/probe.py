"""Measuring at several points of a short full training: what one point says of the start alone, adds up over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.shards import Shards
from adapeft.measure.statistics import ElementShard, Statistics


class ProbeSettings(Protocol):
    """Length of the probe, points at which it is measured, learning rate of Adam."""

    probe_steps: int
    probe_points: int
    probe_learning_rate: float


def measure_along_probe(
    passes: Passes, groups: Groups, settings: ProbeSettings, measure: Callable[[], Statistics]
) -> Statistics:
    """What ``measure`` finds at ``settings.probe_points`` points of a probe: every column becomes [K, P]. Collective.

    The accumulated influence (APPI) of Xu and Bu 2025, whose probe is full training for about a tenth of the steps. The
    points lie evenly from the start to the end of ``settings.probe_steps`` steps of Adam on all candidates and AdamW on
    the always-trained part, without dropout, at a constant learning rate, over half A of the calibration, so that half
    B is still held out. A rank keeps four numbers an element of its own while it lasts; then the candidates are as
    before bit for bit, the always-trained part as the probe has left it.
    """
    shards, batches = passes.shards, passes.calibration.half_a
    start = shards.weights()
    weights = [piece.clone() for piece in start]
    # A group of its own: a rank may hold nothing.
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
    """The steps of the probe after which is measured, 0 and the last among them."""
    return np.linspace(0, settings.probe_steps, settings.probe_points).round().astype(int).tolist()


def _write(shards: Shards, groups: Groups, weights: Sequence[Tensor]) -> None:
    candidates = range(len(groups.parameters))
    shards.write(candidates, {piece.parameter: weight for piece, weight in zip(shards.slices, weights, strict=True)})


def _side_by_side(groups: Groups, points: Sequence[Statistics]) -> Statistics:
    """Columns [K] of P statistics as one [K, P]; of elements [n] as [n, P]."""
    elements = tuple(
        ElementShard(
            shards[0].slice,
            {name: torch.stack([shard.columns[name] for shard in shards], dim=1) for name in shards[0].columns},
        )
        for shards in zip(*(point.elements for point in points), strict=True)
    )
    columns = {name: np.stack([point.columns[name] for point in points], axis=1) for name in points[0].columns}
    return Statistics(groups, columns, elements)

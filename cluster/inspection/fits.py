"""Whether a run fits the machine it is to start on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from adapeft.errors import AdapeftError
from adapeft.memory.estimate import Pass, memory
from cluster.inspection.estimate import Estimate
from cluster.zero.settings import zero_of

TOLERANCE = 1.25
"""A run is refused when it would need this many times what there is: estimates err by less (results/memory.md), and a
wrong refusal is worse than a failure that says the same a minute later."""


def check_memory(estimate: Estimate) -> None:
    """Checks that the run fits this machine, where the run is to be on it.

    Activations of which only a bound is known do not count: the bound is wide, and forbids nothing.

    Raises:
        AdapeftError: it would need more than ``TOLERANCE`` times what there is.
    """
    cluster = estimate.config.cluster
    available = None if os.environ.get("RAY_ADDRESS") else available_memory(gpu=bool(cluster.gpus_per_worker))
    if available is None:
        return
    workers = 1 if cluster.gpus_per_worker else cluster.fewest  # those that share the memory
    zero = zero_of(cluster)
    for stage, load in estimate.loads(zero).items():
        held = memory(load if load.unknown is None else replace(load, passes=Pass(0, 0)), zero)
        if held.total * workers > TOLERANCE * available:
            several = (
                f"{workers} workers need {size(held.total)} each" if workers > 1 else f"it needs {size(held.total)}"
            )
            raise AdapeftError(
                f"{stage} does not fit: {several}, and this machine has {size(available)} free. Most of it are "
                f"{held.biggest} ({size(held.parts[held.biggest])}). {remedy(held.biggest, stage, cluster.zero_stage)}"
            )


def remedy(part: str, stage: str, zero_stage: int) -> str:
    """What makes a part smaller."""
    section = "select" if stage == "measuring" else "train"
    if part == "activations":
        return (
            f"Lower {section}.micro_batch_size or data.max_length, or set model.gradient_checkpointing: true"
            f"{' (which measuring does not use)' if stage == 'measuring' else ''}."
        )
    if part == "statistics":
        return "Narrow select.include, choose select.groups: row instead of element, or take machines with more memory."
    if part == "weights" and zero_stage == 3:
        return "Take model.dtype: bfloat16 or more machines."
    more = "a higher cluster.zero_stage" if zero_stage < 3 else "more machines"
    return f"Train less (select.budget), or take {more}."


def available_memory(*, gpu: bool) -> int | None:
    """Bytes: of the first GPU, or those that are free on this machine within its control group; None: nobody knows."""
    if gpu:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    available = psutil.virtual_memory().available
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, max(int(limit) - int(used), 0))


def size(num_bytes: float) -> str:
    """In GiB, or MiB below one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"

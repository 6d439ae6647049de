"""Check that a run fits into the memory of this machine."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from adapeft.errors import AdapeftError
from adapeft.memory.estimate import Pass, memory, offloaded
from cluster.inspection.estimate import Estimate
from cluster.zero.settings import zero_of

TOLERANCE = 1.25
"""A run is refused if it needs more than this many times the available memory: estimates err by less
(results/memory.md), and a wrong refusal is worse than a failure that says the same a minute later."""


def check_memory(estimate: Estimate, *, trains: bool = True) -> None:
    """Check that the run fits into the memory of this machine, unless it runs on a cluster elsewhere.

    Activations with only a known bound are not counted, because the bound is wide.

    Args:
        estimate: estimate of the run.
        trains: whether the command trains, and does not only choose.

    Raises:
        AdapeftError: the run needs more than ``TOLERANCE`` times the available memory.
    """
    cluster = estimate.config.cluster
    zero = zero_of(cluster)
    if zero.offload != "none" and not os.environ.get("RAY_ADDRESS"):
        _check_offload(estimate)
    for stage, load in estimate.loads(zero).items():
        if stage == "training" and not trains:
            continue
        on_workers = stage != "choosing"
        if on_workers and os.environ.get("RAY_ADDRESS"):
            continue
        on_gpu = stage not in ("loading", "choosing") and bool(cluster.gpus_per_worker)
        available = available_memory(gpu=on_gpu)
        if available is None:
            continue
        # The workers that share the memory.
        workers = cluster.fewest if on_workers and not on_gpu else 1
        held = memory(load if load.unknown is None else replace(load, passes=Pass(0, 0), freed=0, heap=0), zero)
        if held.total * workers > TOLERANCE * available:
            several = (
                f"{workers} workers need {size(held.total)} each" if workers > 1 else f"it needs {size(held.total)}"
            )
            raise AdapeftError(
                f"{stage} does not fit: {several}, and this machine has {size(available)} free. The largest part is "
                f"{held.biggest} ({size(held.parts[held.biggest])}). {remedy(held.biggest, stage, cluster.zero_stage)}"
            )


def _check_offload(estimate: Estimate) -> None:
    """Check that the memory or drive of the workers' machine can keep the weights that are not in use.

    Raises:
        AdapeftError: it cannot.
    """
    cluster = estimate.config.cluster
    zero = zero_of(cluster)
    held = max(offloaded(load, zero) for load in estimate.loads(zero).values())
    if zero.offload == "nvme":
        available: int | None = _free_on_drive(str(cluster.offload_folder))
        place, way = f"{cluster.offload_folder}", "Name a folder on a larger drive"
    else:
        available = available_memory(gpu=False)
        place, way = "the memory of their machine", "Set cluster.offload: nvme, model.dtype: bfloat16"
    if available is not None and held * cluster.fewest > available:
        raise AdapeftError(
            f"cluster.offload = {zero.offload} does not fit: {cluster.fewest} workers keep {size(held)} of weights "
            f"each in {place}, which has {size(available)} free. {way}, or use more machines."
        )


def _free_on_drive(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise AdapeftError(
            f"cluster.offload_folder = {folder}: cannot be used ({error.strerror}). Create it on every machine, on a "
            f"fast local drive."
        ) from error


def remedy(part: str, stage: str, zero_stage: int) -> str:
    """Return a sentence that says how to make a part of the memory smaller."""
    if stage == "loading":
        return (
            "Every worker loads the whole base: set fewer cluster.workers, use more machines, or save the base as "
            "safetensors (save_pretrained) if it is pickled."
        )
    section = "select" if stage != "training" else "train"
    if part == "activations":
        return f"Lower {section}.micro_batch_size or data.max_length, or set model.gradient_checkpointing: true."
    if part == "statistics":
        return "Narrow select.include, set select.groups: row instead of element, or use machines with more memory."
    if part == "weights" and zero_stage == 3:
        return "Set model.dtype: bfloat16, or use more machines."
    more = "a higher cluster.zero_stage" if zero_stage < 3 else "more machines"
    return f"Lower select.budget, or use {more}."


def available_memory(*, gpu: bool) -> int | None:
    """Return the bytes of the first GPU, or the free bytes of this machine within its cgroup; None if unknown."""
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
    """Return a size in GiB, or in MiB below 1 GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"

"""Facts about this machine, as a bug report needs them."""

from __future__ import annotations

import os
import platform
import sys

import torch

from cluster.commands.doctor.packages import installed_version
from cluster.inspection.fits import available_memory, size

_PACKAGES = ("adapeft", "torch", "transformers", "peft", "datasets", "ortools", "deepspeed", "ray")


def machine() -> dict[str, str]:
    """Title → value: Python, versions, accelerator, cores, memory, and the Ray cluster that commands would join."""
    return {
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": platform.platform(),
        "versions": ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in _PACKAGES),
        "accelerator": _accelerator(),
        "processor": f"{len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{size(available_memory(gpu=False) or 0)} free",
        "ray": os.environ.get("RAY_ADDRESS", "RAY_ADDRESS is not set: commands start a local Ray where they need one"),
    }


def _accelerator() -> str:
    if not torch.cuda.is_available():
        return "none: training runs on the CPU, with cluster.gpus_per_worker: 0"
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        devices.append(f"{torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free")
    return "; ".join(devices)

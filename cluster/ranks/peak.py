"""What a rank held at most."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_PEAK = "5"
"""What makes Linux forget the peak of this process (proc(5))."""


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held since ``reset_peak``: of the GPU, or of the machine where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Starts a new peak. Without Linux's /proc the machine's counts from the start of the process."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _CLEAR.write_text(_PEAK)

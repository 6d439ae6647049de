"""Peak memory of a rank."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_PEAK = "5"
"""Value that resets the peak resident set size of this process on Linux (proc(5))."""


def peak_memory(device: torch.device) -> int:
    """Return the peak memory since ``reset_peak``, in bytes: of ``device`` if it is a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Return freed memory to the system and reset the peaks.

    Without Linux's /proc, the peak of the process still counts from its start.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(AttributeError):  # only glibc keeps what an earlier stage has freed
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        _CLEAR.write_text(_PEAK)

"""What a rank held at most."""

from __future__ import annotations

import resource

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held: of the GPU, or of the machine where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

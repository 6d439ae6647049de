"""Tensors whose values are on disk, mapped to memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def on_disk(value: Tensor, folder: Path) -> Tensor:
    """Return a copy of a CPU tensor in a file without a name in ``folder``, which is freed with the tensor.

    Raises:
        OSError: the folder is missing or cannot be written, or its drive is full.
    """
    if not value.numel():
        return value
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # Otherwise the file would have holes, and filling one on a full drive kills the process.
        os.posix_fallocate(file.fileno(), 0, value.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
    return mapped.copy_(value)

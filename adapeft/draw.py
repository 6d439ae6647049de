"""Random numbers that depend only on seed, step and parameter name, not on the rank that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, step: int, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Return uniform float32 values in [0, 1), equal on every rank, in every recomputed forward and after a resume.

    They are drawn for the whole parameter and its shards are slices of them: one temporary tensor of the parameter's
    size.
    """
    mixed = np.random.SeedSequence([seed, step, crc32(name.encode())]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))
    return torch.rand(*shape, generator=generator, device=device)

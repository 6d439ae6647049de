"""Random numbers that depend on seed, step and parameter, and never on who draws them."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, step: int, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """float32 ``shape`` in [0, 1), the same on every rank, in every recomputed forward and after a resume.

    Drawn for a whole parameter, whose shards are slices of it: one transient of its size, freed at once.
    """
    mixed = np.random.SeedSequence([seed, step, crc32(name.encode())]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))
    return torch.rand(*shape, generator=generator, device=device)

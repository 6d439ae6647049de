"""Draws for sampled labels that depend on the example and the seed alone, and logits wide enough to draw from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def wide(logits: Tensor) -> Tensor:
    """The logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def uniforms(ids: Tensor, length: int, seed: int) -> Tensor:
    """float64 [n, length] in (0, 1); a row is the stream of (seed, example id), so no rank or batch changes it."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, example])).random(length) for example in ids.tolist()]
    return torch.from_numpy(np.stack(streams)).clamp(1e-12, 1 - 1e-12)

"""Random draws for sampled labels that depend only on the example and the seed, and logits in sufficient precision."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def wide(logits: Tensor) -> Tensor:
    """Return the logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def uniforms(ids: Tensor, length: int, seed: int) -> Tensor:
    """Return draws in (0, 1), float64 [n, length]; each row depends on (seed, example id), not on rank or batch."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, example])).random(length) for example in ids.tolist()]
    return torch.from_numpy(np.stack(streams)).clamp(1e-12, 1 - 1e-12)

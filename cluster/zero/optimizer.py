"""The optimizer of the engines, which can skip whole steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose steps change neither weights, moments nor step counts while ``skips`` is true."""

    skips = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step unless ``skips`` is true."""
        return None if self.skips else super().step(closure)

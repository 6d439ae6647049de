"""Optimizers of the engines: one for measuring, which skips the candidates, and one that can skip whole steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class AlwaysTrainedAdamW(torch.optim.AdamW):
    """AdamW that skips groups with a learning rate of 0: their weights stay unchanged and no state is allocated.

    DeepSpeed needs an optimizer over all parameters with gradients; candidates must not cost optimizer memory.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the groups with a positive learning rate."""
        resting = [group for group in self.param_groups if group["lr"] == 0]
        members = [group["params"] for group in resting]
        for group in resting:
            group["params"] = []
        try:
            return super().step(closure)
        finally:
            for group, params in zip(resting, members, strict=True):
                group["params"] = params


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose steps change neither weights, moments nor step counts while ``skips`` is true."""

    skips = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step unless ``skips`` is true."""
        return None if self.skips else super().step(closure)

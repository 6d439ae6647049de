"""The optimizers of the engines: one that mostly rests, for measuring, and one that can skip a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class AlwaysTrainedAdamW(torch.optim.AdamW):
    """AdamW that leaves groups with a learning rate of 0 alone: their weights do not move and no state is allocated.

    DeepSpeed needs an optimizer over all that gets gradients; what is only measured must not pay for one.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the groups with a positive learning rate."""
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
    """AdamW whose steps change nothing while ``skips`` is true: neither weights nor moments nor step counts."""

    skips = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps, or does not."""
        return None if self.skips else super().step(closure)

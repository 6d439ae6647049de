"""A check that the gradients of a training reach the whole subset."""

from __future__ import annotations

import torch

from adapeft.ranks import Ranks
from adapeft.tune.attachment import Attachment
from adapeft.tune.check import unreached_error

PATIENCE = 8
"""Optimizer steps after which a part without a gradient stops the training.

One step is not enough: LayerDrop skips one layer in ten, and experts without routed tokens get no gradient.
"""


class UnreachedCheck:
    """Stops training on all ranks if the gradients do not reach the whole subset.

    Args:
        attachment: attachment of this rank's model.
        ranks: ranks that train the model.
    """

    def __init__(self, attachment: Attachment, ranks: Ranks) -> None:
        self._attachment, self._ranks = attachment, ranks
        self._steps = 0
        self._is_done = False

    def after_step(self, *, is_last_chance: bool) -> None:
        """Check which parts have received a gradient so far. Collective.

        Args:
            is_last_chance: whether an evaluation, which may save a delta, comes next.

        Raises:
            AdapeftError: no rank had a gradient for some part, after ``PATIENCE`` steps or at the last chance.
        """
        if self._is_done:
            return
        self._steps += 1
        names = list(self._attachment.owners)
        unreached = set(self._attachment.unreached)
        reached = self._ranks.all_reduce(torch.tensor([name not in unreached for name in names], dtype=torch.int64))
        missing = [name for name, count in zip(names, reached, strict=True) if not count]
        if missing and (is_last_chance or self._steps >= PATIENCE):
            raise unreached_error(self._attachment, missing)
        if not missing:
            self._is_done = True
            # Parts reached on another rank count here too, for the check of the delta.
            self._attachment.reached.update(
                (name, piece) for name, pieces in self._attachment.owners.items() for piece in pieces
            )

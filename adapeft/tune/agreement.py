"""Check that all ranks of a training attach the same subset. Nothing else would say that they do not."""

from __future__ import annotations

import torch.distributed as dist

from adapeft.errors import AdapeftError
from adapeft.subset.subset import Subset

_KEY = "adapeft.attach"


def check_agreement(subset: Subset) -> None:
    """Compare ``subset`` with what other ranks of torch.distributed attach, in their call of the same number.

    Every rank that chooses by itself, on its own share of the data, would choose another subset; leaves of one size
    are trained and averaged all the same. Ranks compare through the store of the process group and do not wait, so
    that a rank may attach alone.

    Raises:
        AdapeftError: another rank has attached another subset.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store, rank, digest = dist.distributed_c10d._get_default_store(), dist.get_rank(), subset.digest
    number = store.add(f"{_KEY}/{rank}", 1)
    first, _, expected = store.compare_set(f"{_KEY}/{number}", "", f"{rank} {digest}").decode().partition(" ")
    if expected and expected != digest:
        raise AdapeftError(
            f"rank {rank} attaches another subset than rank {first}. Choose on one rank, save the subset, and attach "
            f"the saved one on every rank, as in deploy/examples/accelerate_loop.py."
        )

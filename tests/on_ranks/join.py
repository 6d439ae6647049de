"""Run under torchrun: joins the process group and leaves it."""

from __future__ import annotations

import torch

from tests.support.ranks import leave

if __name__ == "__main__":
    from cluster.zero.engine import join

    ranks = join()
    assert float(ranks.all_reduce(torch.ones(1))) == ranks.world_size
    leave()

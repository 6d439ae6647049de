"""Run under torchrun: joins the process group and leaves it again."""

from __future__ import annotations

import torch

if __name__ == "__main__":
    from cluster.engine import join

    ranks = join()
    assert float(ranks.all_reduce(torch.ones(1))) == ranks.world_size
    torch.distributed.destroy_process_group()

"""Run under torchrun: stages on ranks that act as separate machines, called as by Ray.

``torchrun --nproc-per-node 2 -m tests.on_ranks.copies CACHES STAGES STOP CONFIG key=value …``: ``CACHES`` lists
the cache folder of each rank; ``STAGES`` are ``measure``, ``train`` or both. Training raises after step ``STOP`` unless
that is 0.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch.distributed as dist

from adapeft.config.load import load_config
from cluster.launch.copies import Look, run_copy
from cluster.output.folder import RunFolder
from cluster.ranks.finetune import finetune
from cluster.ranks.measure import measure_and_choose
from tests.support.ranks import leave


class StoppedError(Exception):
    """Simulates a killed process, except that it still uploads files."""


def main(caches: str, stages: str, stop: int, path: str, *overrides: str) -> None:
    cache = os.environ["XDG_CACHE_HOME"] = caches.split(",")[int(os.environ["RANK"])]
    config = load_config(path, overrides)
    functions = {"measure": measure_and_choose, "train": finetune}
    for stage in stages.split(","):
        try:
            with run_copy(config, ".mark", cache, puts=True) as look:
                (RunFolder.of(config).logs / f"{stage}-rank-{os.environ['RANK']}.log").write_text(cache)

                def report(event: dict[str, Any], look: Look = look) -> None:
                    look()
                    if stop and event["step"] == "training" and event["done"] > stop:
                        raise StoppedError

                functions[stage](config, report)
        except StoppedError:
            dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    leave()

"""Run under torchrun: ``finetune`` on a config, called as by Ray, optionally stopped at a step.

``torchrun --nproc-per-node 2 -m tests.on_ranks.finetune STOP CONFIG key=value …`` raises after the
step STOP, unless that is 0. An error of a rank is written to ``error-RANK.txt`` in the run folder.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch.distributed as dist

from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from cluster.output.folder import RunFolder
from cluster.ranks.finetune import finetune
from cluster.ranks.measure import measure_and_choose
from tests.support.normalized import make_normalized
from tests.support.torchrun import leave

__all__ = ["make_normalized"]  # registers its architecture


class StoppedError(Exception):
    """Simulates a killed process."""


def main(stop: int, path: str, *overrides: str) -> None:
    def report(event: dict[str, Any]) -> None:
        if stop and event["step"] == "training" and event["done"] > stop:
            raise StoppedError

    config = load_config(path, overrides)
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.subset.is_file():
        measure_and_choose(config, lambda event: None)
        dist.barrier()  # rank 0 writes the subset after the others are done; with Ray, training starts after all ranks
    try:
        result = finetune(config, report)
    except StoppedError:
        return
    except AdapeftError as error:
        (folder.path / f"error-{dist.get_rank()}.txt").write_text(str(error))
        return
    if dist.get_rank() == 0:
        (folder.path / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
    leave()

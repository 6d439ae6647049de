"""Run under torchrun: ``finetune`` on a config, called as by Ray, optionally stopped at a step.

``torchrun --nproc-per-node 2 -m tests.on_ranks.finetune STOP CONFIG key=value …`` raises after the
step STOP, unless that is 0. An error of a rank is written to ``error-RANK.txt`` in the run folder, the learning rates
that were reported to ``rates.json``, and how often the rate of the head was determined to ``found-rates.json``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from cluster.events import Report
from cluster.output.folder import RunFolder
from cluster.ranks import finetune as finetuning
from cluster.ranks import measure as measuring
from tests.support.normalized import make_normalized
from tests.support.torchrun import leave

__all__ = ["make_normalized"]  # registers its architecture


class StoppedError(Exception):
    """Simulates a killed process."""


def main(stop: int, path: str, *overrides: str) -> None:
    rates = {}

    def report(event: dict[str, Any]) -> None:
        if event["step"] == "training":
            rates[event["done"]] = event["lr"]
        if stop and event["step"] == "training" and event["done"] > stop:
            raise StoppedError

    config = load_config(path, overrides)
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    # At the usual threshold stage 3 would keep a tiny model whole on every rank.
    with (
        patch.object(measuring, "inference_engine", partial(measuring.inference_engine, persistence_threshold=0)),
        patch.object(finetuning, "training_engine", partial(finetuning.training_engine, persistence_threshold=0)),
        patch.object(finetuning, "find_head_rate", wraps=finetuning.find_head_rate) as find,
    ):
        run(config, folder, report)
    if dist.get_rank() == 0:
        (folder.path / "found-rates.json").write_text(json.dumps(find.call_count))
        (folder.path / "rates.json").write_text(json.dumps(rates))


def run(config: Config, folder: RunFolder, report: Report) -> None:
    if not folder.subset.is_file():
        measuring.measure_and_choose(config, lambda event: None)
        dist.barrier()  # rank 0 writes the subset after the others are done; with Ray, training starts after all ranks
    try:
        result = finetuning.finetune(config, report)
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

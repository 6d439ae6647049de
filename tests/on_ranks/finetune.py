"""Run under torchrun: ``finetune`` on a config, called as by Ray, optionally stopped at a step.

``torchrun --nproc-per-node 2 -m tests.on_ranks.finetune STOP CONFIG key=value …`` raises after the
step STOP, unless that is 0. An error of a rank is written to ``error-RANK.txt`` in the run folder, the learning rates
that were reported to ``rates.json``, how often the rate of the head was determined to ``found-rates.json``, and at
stage 3, where a rank kept its parts of the weights to ``parts-RANK.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import nn

from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from cluster.events import Report
from cluster.output.folder import RunFolder
from cluster.ranks import finetune as finetuning
from cluster.ranks import measure as measuring
from tests.support.normalized import make_normalized
from tests.support.ranks import leave

__all__ = ["make_normalized"]  # registers its architecture


class StoppedError(Exception):
    """Simulates a killed process."""


def main(stop: int, path: str, *overrides: str) -> None:
    rates, parts = {}, {}

    def report(event: dict[str, Any]) -> None:
        if event["step"] == "training":
            rates[event["done"]] = event["lr"]
        if stop and event["step"] == "training" and event["done"] > stop:
            raise StoppedError

    def releasing(stage: str, release: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def released(engine: nn.Module) -> None:
            if config.cluster.zero_stage == 3:
                parts[stage] = parts_of(engine, config)
            release(engine)

        return released

    config = load_config(path, overrides)
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    # At the usual threshold stage 3 would keep a tiny model whole on every rank.
    with (
        patch.object(measuring, "inference_engine", partial(measuring.inference_engine, persistence_threshold=0)),
        patch.object(finetuning, "training_engine", partial(finetuning.training_engine, persistence_threshold=0)),
        patch.object(finetuning, "find_head_rate", wraps=finetuning.find_head_rate) as find,
        patch.object(measuring, "release", releasing("measuring", measuring.release)),
        patch.object(finetuning, "release", releasing("training", finetuning.release)),
    ):
        run(config, folder, report)
    (folder.path / f"parts-{dist.get_rank()}.json").write_text(json.dumps(parts))
    if dist.get_rank() == 0:
        (folder.path / "found-rates.json").write_text(json.dumps(find.call_count))
        (folder.path / "rates.json").write_text(json.dumps(rates))


def parts_of(engine: nn.Module, config: Config) -> dict[str, Any]:
    """Return where this rank's parts of the weights are at the end of an engine's work at stage 3."""
    parameters = dict(engine.module.named_parameters())
    offload = engine.zero_offload_param()
    return {
        "offload": "none" if offload is None else offload.device,
        "kept whole": sum(parameter.ds_persist for parameter in parameters.values()),
        "mapped": Path("/proc/self/maps").read_text().count(f"{config.cluster.offload_folder}/"),
        "of the base": sum("_leaf" not in name for name in parameters),
        "frozen": sum(not parameter.requires_grad for parameter in parameters.values()),
        "windows": sum(name.endswith("_leaf_left") for name in parameters),
    }


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

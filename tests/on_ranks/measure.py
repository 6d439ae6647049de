"""Run under torchrun: measuring at every ZeRO stage, uninterrupted, and stopped and resumed.

``torchrun --nproc-per-node 2 -m tests.on_ranks.measure CONFIG OUT`` makes runs ``…-undisturbed`` and ``…-stopped``
and writes the batches that the latter measured after resuming, and the peaks of a run whose choosing takes memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from adapeft.config.load import load_config
from cluster.events import ignore
from cluster.ranks import measure as measuring
from cluster.ranks.peak import peak_memory
from tests.support.ranks import leave

OVERRIDES = ["calibration=48", "warmup_steps=4", "select.batch_size=8", "cluster.save_interval=1e-9"]
# tag → (further overrides, batches before the stop, which is in a warm-up, the direction, slope or curvature pass)
RUNS = {
    "row-0": (["groups=row", "zero_stage=0"], 9),
    "element-2": (["groups=element", "zero_stage=2", "select.micro_batch_size=2"], 15),
    "bf16-0": (["groups=element", "zero_stage=0", "dtype=bfloat16"], 13),
    "low-rank-3": (["groups=row", "zero_stage=3", "measure=low-rank", "rank=3"], 9),
    "probe-3": (["groups=row", "zero_stage=3", "probe_steps=2", "probe_points=2"], 27),
}


CHOOSING = 2**29
"""Bytes that the second rank allocates while it chooses."""


class StoppedError(Exception):
    """Simulates a killed process."""


def measured(path: str, overrides: list[str], stop: int = 0) -> list[tuple[str, int]]:
    """Measure up to the stop and return the batches that were done."""
    done = []

    def report(event: dict[str, Any]) -> None:
        if "done" in event:
            if stop and len(done) == stop:
                raise StoppedError
            done.append((event["step"], event["done"]))

    torch.manual_seed(0)  # of a new head
    try:
        measuring.measure_and_choose(load_config(path, overrides), report)
    except StoppedError:
        dist.barrier()
    return done


def peaks(path: str, overrides: list[str]) -> list[int]:
    """Return the peak memory of this rank so far, and the one that a measurement with a large choice reports."""

    def choose(*arguments: Any) -> Any:
        torch.ones(dist.get_rank() * CHOOSING // 4)
        return choose_and_save(*arguments)

    choose_and_save, before = measuring.choose_and_save, peak_memory(torch.device("cpu"))
    with patch.object(measuring, "choose_and_save", choose):
        found = measuring.measure_and_choose(load_config(path, overrides), ignore)
    return [before, found["measuring_peak_memory_bytes"]]


def main(path: str, out: Path) -> None:
    from cluster.zero.engine import join

    join()
    for tag, (overrides, stop) in RUNS.items():
        same = [*OVERRIDES, *overrides]
        whole = measured(path, [*same, f"output={out / f'{tag}-undisturbed'}"])
        stopped = [*same, f"output={out / f'{tag}-stopped'}"]
        first = measured(path, stopped, stop)
        second = measured(path, stopped)
        if dist.get_rank() == 0:
            (out / f"{tag}.json").write_text(json.dumps([whole, first, second]))
    found = peaks(path, [*OVERRIDES, "groups=row", "zero_stage=0", f"output={out / 'peaks'}"])
    if dist.get_rank() == 0:
        (out / "peaks.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()

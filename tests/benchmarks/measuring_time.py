"""Processor time of a measurement in plain forward-and-backward passes of the same model over the same batches.

``python -m tests.benchmarks.measuring_time CONFIG [key=value …] [--rounds 5] [--how low-rank]`` prints a table. A
plain pass computes the gradients of all candidates, as training everything would, in evaluation mode. In every round
each measurement is timed once, with its decompositions and sums and without the warm-up of a head, all in one process.
The figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import median

from torch import nn

from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.data.batches import Calibration, draw_calibration
from adapeft.measure.groups import Groups, groups_of
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.measure import measure
from adapeft.measure.mode import set_measuring_mode
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from adapeft.ranks import OneRank
from adapeft.tasks.losses.micro_batches import micro_losses
from cluster.ranks.inputs import Inputs, load_inputs

_PASSES = 3
"""Plain passes over half of the calibration, which an exact measurement takes at least."""


def main() -> None:
    """Print seconds of each measurement and of three plain passes over half of the calibration, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--how", nargs="+", default=["low-rank", "exact"], choices=["low-rank", "exact"])
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_intermixed_args()

    def config(*own: str) -> Config:
        return load_config(arguments.config, [*arguments.overrides, "output=unused", *own])

    measurements = {
        f"{unit}s, {how}": config(f"select.groups={unit}", f"select.measure={how}", "select.warmup_steps=0")
        for unit in ("row", "element")
        for how in arguments.how
    }
    inputs = load_inputs(config())
    model = inputs.model()
    set_measuring_mode(model)
    settings = inputs.config.select
    calibration = draw_calibration(len(inputs.train), settings.calibration, settings.batch_size, 1, inputs.config.seed)
    trained = groups_of(model, settings)
    names = {*(info.name for info in trained.parameters), *trained.always_train}
    timed: dict[str, Callable[[], None]] = {"plain": lambda: plain_pass(model, inputs, calibration, names)}
    for name, one in measurements.items():
        timed[name] = partial(measured, model, inputs, calibration, one, groups_of(model, one.select))
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(arguments.rounds + 1):
        for name, run in timed.items():
            gc.collect()
            start = time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    allowed = [_PASSES / 2 * one for one in seconds["plain"]]
    print("| | processor seconds | share of three plain passes | from | to |")
    print("|---|---|---|---|---|")
    print(f"| three plain passes | {median(allowed):.2f} | 1 | | |")
    for name in measurements:
        shares = [one / three for one, three in zip(seconds[name], allowed, strict=True)]
        print(
            f"| {name} | {median(seconds[name]):.2f} | {median(shares):.2f} | {min(shares):.2f} | {max(shares):.2f} |",
            flush=True,
        )


def plain_pass(model: nn.Module, inputs: Inputs, calibration: Calibration, trained: Collection[str]) -> None:
    """Compute the gradients of the parameters in ``trained`` for every batch of both halves."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    device = next(model.parameters()).device
    for batch in calibration.batches:
        (loss,), _ = micro_losses(batch, inputs.train.collate, inputs.objective, OneRank(), 1, device)
        loss(model).backward()
        model.zero_grad(set_to_none=True)


def measured(model: nn.Module, inputs: Inputs, calibration: Calibration, config: Config, groups: Groups) -> None:
    """Measure as ``adapeft select`` does in a single process."""
    settings = config.select
    method = get_method(settings.method)
    with seen(model, groups, method.window_rank(groups, settings), config.seed) as view:
        shards = view.shards(WholeModel(model, view.names, groups.always_train))
        passes = Passes(shards, inputs.objective, calibration, inputs.train.collate, config.seed)
        measure(method, passes, groups, settings)


if __name__ == "__main__":
    main()

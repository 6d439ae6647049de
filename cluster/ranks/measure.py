"""The rank function that measures groups and chooses a subset. Runs under any launcher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from adapeft.config.config import Config
from adapeft.config.keys import measurement_key
from adapeft.data.batches import draw_calibration, num_micro_batches
from adapeft.measure.groups import Groups, groups_of
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.measure import measure, not_reached
from adapeft.measure.mode import set_measuring_mode
from adapeft.measure.partial import PartialSums
from adapeft.measure.passes import Passes
from adapeft.measure.storage import save_elements
from adapeft.memory.limit import MemoryLimit
from adapeft.methods.registry import get_method
from cluster.events import Report
from cluster.output.folder import RunFolder
from cluster.ranks.choose import choose_and_save
from cluster.ranks.inputs import Inputs, check_loss, load_inputs
from cluster.ranks.peak import peak_memory
from cluster.zero.division import division_of
from cluster.zero.engine import DistributedRanks, inference_engine, join, release
from cluster.zero.shards import shards_of


def measure_and_choose(config: Config, report: Report, limit: MemoryLimit | None = None) -> dict[str, Any]:
    """Measure the groups on this rank's shards, choose a subset, and write table, statistics and subset.

    Returns:
        Entries of ``metrics.json``.
    """
    ranks = join()
    report({"step": "loading model and data"})
    inputs = load_inputs(config, report=report)
    contents = inputs.claimed_contents()
    settings = config.select
    method = get_method(settings.method)
    batch_size = 1 if method.measures_examples else settings.batch_size
    model = inputs.model(division_of(config.cluster))
    set_measuring_mode(model)
    groups = groups_of(model, settings)
    folder = RunFolder.of(config)
    key = sums_key(config, contents, groups, len(inputs.train), ranks.world_size)
    saved = PartialSums(folder.path, key, config.cluster.save_interval, ranks)
    if saved.dropped:
        report({"step": f"measuring from the start: saved sums belong to a different {', '.join(saved.dropped)}"})
    with measuring_passes(config, inputs, model, groups, batch_size, ranks, report, saved) as passes:
        statistics = measure(method, passes, groups, settings)
        if statistics.groups.unreached:
            report({"step": not_reached(statistics.groups.unreached)})
        if groups.granularity == "element" and statistics.columns:  # also on a rank that holds none
            save_elements(folder.path, statistics.elements, ranks)
        report({"step": "choosing"})
        choose_and_save(config, contents, statistics, inputs.num_examples, ranks, limit, passes)
    saved.remove()
    return {"measuring_peak_memory_bytes": max(ranks.all_gather_object(peak_memory(ranks.device)))}


@contextmanager
def measuring_passes(
    config: Config,
    inputs: Inputs,
    model: nn.Module,
    groups: Groups,
    batch_size: int,
    ranks: DistributedRanks,
    report: Report,
    saved: PartialSums | None = None,
) -> Iterator[Passes]:
    """Create passes over the calibration on this rank's shards; ``model`` is unusable afterwards. Collective."""
    calibration = draw_calibration(
        len(inputs.train), config.select.calibration, batch_size, ranks.world_size, config.seed
    )
    num_micro = num_micro_batches(batch_size, ranks.world_size, config.select.micro_batch_size)
    rank = get_method(config.select.method).window_rank(groups, config.select)
    with seen(model, groups, rank, config.seed) as view:
        engine = inference_engine(model, config.cluster.zero_stage, config.cluster.offload)
        check_loss(engine, inputs, ranks.world_size, report)
        yield Passes(
            view.shards(shards_of(engine, view.names, groups.always_train, num_micro, ranks)),
            inputs.objective,
            calibration,
            inputs.train.collate,
            config.seed,
            lambda step, done, total: report({"step": step, "done": done, "total": total}),
            saved=saved,
        )
        release(engine)


def sums_key(
    config: Config, contents: Mapping[str, str], groups: Groups, num_examples: int, world_size: int
) -> dict[str, Any]:
    """Return everything that partial sums depend on bit for bit: the measurement, and the division of the work."""
    return {
        **measurement_key(config, contents, groups.num_total, is_quantized=groups.is_quantized),
        "base model": groups.fingerprint,
        "number of examples": num_examples,
        "division": "every parameter evenly",
        "cluster.workers": world_size,
        "cluster.zero_stage": config.cluster.zero_stage,
        "select.micro_batch_size": config.select.micro_batch_size,
        **({} if config.data.packed_length is None else {"data.packing": True}),
    }

"""Run under torchrun: statistics and subsets of tiny models at every ZeRO stage, as this world size sees them.

``torchrun --nproc-per-node 2 -m tests.cluster.rank_statistics OUT`` writes OUT/{model}-{granularity}-{stage}-{micro}.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from adapeft.choose.choose import choose
from adapeft.config import parse_select
from adapeft.inputs.batches import Calibration, num_micro_batches
from adapeft.inputs.data import Batch
from adapeft.inputs.objective import infer_objective
from adapeft.measure.groups import Groups, build_groups
from adapeft.measure.measure import measure
from adapeft.measure.passes import Passes
from adapeft.measure.shards import Shards, WholeModel
from adapeft.measure.statistics import Statistics
from adapeft.methods import get_method
from adapeft.ranks import Ranks
from tests.tiny import make_batches, make_bert, make_gpt2

MODELS = {"bert": make_bert, "gpt2": make_gpt2}
METHODS = {"tensor": "adapeft", "row": "adapeft", "element": "adapeft", "sam": "sam"}
REACH = 0.01


def settings_for(case: str):
    granularity = "element" if case == "sam" else case
    return parse_select({"method": METHODS[case], "groups": granularity, "budget": "10%", "warmup_steps": 3})


def examples_of(model) -> tuple[list[np.ndarray], list[Batch]]:
    """Every example by itself, and the global batches as indices."""
    examples, order, seen = [], [], 0
    for batch in make_batches(model, num_batches=7):
        size = len(batch["labels"])
        order.append(np.arange(seen, seen + size))
        for row in range(size):
            inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            examples.append(Batch(inputs, batch["labels"][row : row + 1], torch.tensor([seen + row])))
        seen += size
    return order, examples


def passes_for(model, shards: Shards) -> Passes:
    order, examples = examples_of(model)

    def collate(indices: np.ndarray) -> Batch:
        chosen = [examples[int(index)] for index in indices]
        inputs = {name: torch.cat([one.inputs[name] for one in chosen]) for name in chosen[0].inputs}
        return Batch(inputs, torch.cat([one.labels for one in chosen]), torch.cat([one.ids for one in chosen]))

    objective = infer_objective(model, examples[0].inputs, examples[0].labels)
    return Passes(shards, objective, Calibration(tuple(order[:3]), tuple(order[3:])), collate, seed=3)


def measure_case(model, shards: Shards, groups: Groups, case: str) -> tuple[Statistics, dict]:
    settings = settings_for(case)
    statistics = measure(get_method(settings.method), passes_for(model, shards), groups, settings)
    subset = choose(settings, statistics, reach=REACH, seed=3, ranks=shards.ranks)
    return statistics, {name: part.indices for name, part in subset.parts.items()}


def whole_elements(statistics: Statistics, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Element statistics of all ranks put together, float64, by column; every element must come from one rank."""
    starts = np.concatenate([[0], np.cumsum([info.count for info in statistics.groups.parameters])])
    names = statistics.elements[0].columns if statistics.elements else []
    whole = {name: torch.zeros(int(starts[-1]), dtype=torch.float64) for name in names}
    held = torch.zeros(int(starts[-1]), dtype=torch.int64)
    for shard in statistics.elements:
        place = slice(int(starts[shard.slice.parameter]) + shard.slice.start, None)
        for name, column in shard.columns.items():
            whole[name][place][: shard.slice.length] = column.double()
        held[place][: shard.slice.length] += 1
    if statistics.elements:
        assert bool((ranks.all_reduce(held) == 1).all()), "an element is on no rank or on two"
    return {name: ranks.all_reduce(column) for name, column in whole.items()}


def main(out: Path) -> None:
    from cluster.engine import join, measuring_engine
    from cluster.zero_shards import ZeroShards

    ranks = join()
    for name, make in MODELS.items():
        for case in METHODS:
            for stage in range(4):
                for micro_batch_size in (None, 2):
                    model = make().eval()
                    settings = settings_for(case)
                    groups = build_groups(model, settings.granularity)
                    candidates = [info.name for info in groups.parameters]
                    num_micro = num_micro_batches(5, ranks.world_size, micro_batch_size)
                    engine = measuring_engine(model, candidates, groups.always_train, stage, num_micro)
                    statistics, chosen = measure_case(model, ZeroShards(engine, candidates, ranks), groups, case)
                    elements = whole_elements(statistics, ranks)
                    states = sum(len(state) for state in engine.optimizer.optimizer.state.values()) if stage else 0
                    engine.destroy()
                    if ranks.rank == 0:
                        content = {"columns": statistics.columns, "elements": elements, "chosen": chosen}
                        content["states"] = states
                        torch.save(content, out / f"{name}-{case}-{stage}-{micro_batch_size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run under torchrun: statistics and subsets of tiny models at every ZeRO stage with this world size.

``torchrun --nproc-per-node 2 -m tests.on_ranks.statistics OUT fast`` writes one file per model, case, stage and
micro-batch size; ``every`` instead of ``fast`` adds those that only slow tests use.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from adapeft.config.load import parse_select
from adapeft.data.batches import Calibration, num_micro_batches
from adapeft.data.description import Batch
from adapeft.measure import passes as passing
from adapeft.measure.exact import parabola
from adapeft.measure.groups import Groups, groups_of
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.measure import measure
from adapeft.measure.passes import Passes
from adapeft.measure.shards import arriving
from adapeft.measure.shards.shards import Shards
from adapeft.measure.statistics import Statistics
from adapeft.methods.registry import get_method
from adapeft.ranks import Ranks
from adapeft.selection.choose import choose, judged
from adapeft.tasks.inference import infer_objective
from adapeft.tasks.losses import pieces
from tests.support.gradients import LiveGradients
from tests.support.ranks import leave
from tests.support.tiny import VOCABULARY, make_batches, make_bert, make_gpt2

MODELS = {"bert": make_bert, "gpt2": make_gpt2}
CASES = {
    "tensor": {"groups": "tensor"},
    "row": {"groups": "row"},
    "element": {"groups": "element"},
    "sam": {"method": "sam"},
    "joint": {"groups": "row", "joint": True},
    "sam-by-tensor": {"method": "sam", "scope": "tensor"},
    "magnitude": {"method": "magnitude"},
    "fish": {"method": "fish"},
    "snip": {"method": "snip"},
    "options": {"groups": "row", "options": ["row", "tensor", "lora"], "lora_ranks": [1, 2, 3]},
    "low-rank": {"groups": "row", "measure": "low-rank", "rank": 3},
    "low-rank-options": {
        **{"groups": "row", "options": ["row", "tensor", "lora"], "lora_ranks": [1, 2]},
        **{"measure": "low-rank", "rank": 4},
    },
    "low-rank-elements": {"groups": "element", "measure": "low-rank", "rank": 4},
    "role": {"groups": "role", "solver": "greedy"},
    "parabola": {"groups": "role", "curvature": "parabola", "include": ["*bias"], "budget": 100},
    "probe": {"groups": "row", "probe_steps": 3, "probe_points": 2, "probe_learning_rate": 1e-2},
    "probe-element": {"groups": "element", "probe_steps": 3, "probe_points": 3},
}
JUDGED = ("row", "element")
"""Cases whose directions are counted, which takes one more pass."""

BUCKET = 100
"""So that ranks sum some gradients together, and others alone."""
PIECE_BYTES = 4 * VOCABULARY * 7
"""So that ranks compute the logits of a language model seven positions at a time; one process has all at once."""
REACH = 0.01
BATCH_SIZE = 5
# ZeRO stage and micro-batch size; None: the whole share of a rank, 2: gradient accumulation.
STAGES = [(0, None), (1, None), (2, None), (3, None), (0, 2), (3, 2)]
# Cases after the first four need fewer stages, unless they move the weights.
FEWER_STAGES = {case: [(1, None), (3, None)] for case in list(CASES)[4:]}
FEWER_STAGES |= {"parabola": [(0, None), (2, None), (3, None)], "probe": [(0, None), (2, None), (3, 2)]}
FEWER_STAGES |= {"probe-element": [(3, None)]}
RUNS = [(name, case, *run) for name in MODELS for case in CASES for run in FEWER_STAGES.get(case, STAGES)]
# Rows and elements at every stage, all others at stage 3, which divides what the others share. A second model adds only
# transposed weights, and accumulation a part of one path, which matter at stage 3. Probes of elements add nothing to
# those of rows and to elements.
_UNITS = ("row", "element")
FAST = [
    (name, case, stage, size)
    for name, case, stage, size in RUNS
    if (name == "gpt2" and case in _UNITS and (stage, size) == (3, None))
    or (name == "bert" and case != "probe-element" and (stage == 3 or (case in _UNITS and size is None)))
]


def settings_for(case: str):
    return parse_select({"budget": "10%", "warmup_steps": 3, **CASES[case]})


def rank_for(case: str, groups: Groups) -> int | None:
    settings = settings_for(case)
    return get_method(settings.method).window_rank(groups, settings)


def examples_of(model) -> tuple[list[np.ndarray], list[Batch]]:
    """Return all examples one by one, and the global batches as indices."""
    examples, order, seen = [], [], 0
    for batch in make_batches(model, num_batches=7):
        size = len(batch["labels"])
        order.append(np.arange(seen, seen + size))
        for row in range(size):
            inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            examples.append(Batch(inputs, batch["labels"][row : row + 1], torch.tensor([seen + row])))
        seen += size
    return order, examples


def joined(examples: list[Batch], indices: np.ndarray) -> Batch:
    """Return the examples at ``indices`` as one batch, as long as the longest of them, so ranks' lengths differ."""
    chosen = [examples[int(index)] for index in indices]
    length = max(int(one.inputs["attention_mask"].sum()) for one in chosen)
    inputs = {name: torch.cat([one.inputs[name][:, :length] for one in chosen]) for name in chosen[0].inputs}
    labels = torch.cat([one.labels[..., :length] if one.labels.ndim == 2 else one.labels for one in chosen])
    return Batch(inputs, labels, torch.cat([one.ids for one in chosen]))


def passes_for(model, shards: Shards, *, by_example: bool = False) -> Passes:
    order, examples = examples_of(model)
    if by_example:
        order = [index[None] for batch in order for index in batch]
    objective = infer_objective(model, examples[0].labels)
    calibration = Calibration(tuple(order[:3]), tuple(order[3:]))
    return Passes(shards, objective, calibration, lambda ids: joined(examples, ids), seed=3)


def measure_case(model, shards: Shards, groups: Groups, case: str) -> tuple[Statistics, dict, list]:
    """Return statistics, chosen parts, and the figures of the verdict."""
    settings = settings_for(case)
    method = get_method(settings.method)
    passes = passes_for(model, shards, by_example=method.measures_examples)
    with (
        # A tiny model's loss has too little curvature over the usual step: rounding would dominate the fit.
        patch.object(parabola, "STEP", 0.05),
        # A tiny head reads so little that the sizes of its inputs would not matter.
        patch.object(passing, "_WARMUP_STEP", 5e-3),
    ):
        statistics = measure(method, passes, groups, settings)
    subset = choose(settings, statistics, reach=REACH, seed=3, ranks=shards.ranks)
    if case in JUDGED:
        subset = judged(subset, passes, groups, settings, 3)
    said = subset.choice
    return statistics, dict(subset.parts), [said.reliability, said.directions, said.candidate_directions]


def whole_elements(statistics: Statistics, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return element statistics of all ranks by column, float64; every element must be on exactly one rank."""
    starts = np.concatenate([[0], np.cumsum([info.count for info in statistics.groups.parameters])])
    names = statistics.elements[0].columns if statistics.elements else []
    whole = {
        name: torch.zeros(int(starts[-1]), *statistics.elements[0].columns[name].shape[1:], dtype=torch.float64)
        for name in names
    }
    held = torch.zeros(int(starts[-1]), dtype=torch.int64)
    for shard in statistics.elements:
        place = slice(int(starts[shard.slice.parameter]) + shard.slice.start, None)
        for name, column in shard.columns.items():
            whole[name][place][: shard.slice.length] = column.double()
        held[place][: shard.slice.length] += 1
    if statistics.elements:
        assert bool((ranks.all_reduce(held) == 1).all()), "an element is on no rank or on two"
    return {name: ranks.all_reduce(column) for name, column in whole.items()}


def weights_on_rank(shards) -> list[torch.Tensor]:
    """Return all weights of the candidates on this rank: its shard, and the module's own tensors."""
    return shards.weights() + [parameter.detach().clone() for parameter in shards._candidates]


def optimizer_state_elements(engine) -> int:
    """Return the number of elements of optimizer state on this rank, without step counters."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() for tensor in tensors if tensor.numel() > 1)


def always_trained_elements(model, groups: Groups) -> int:
    parameters = dict(model.named_parameters())
    return sum(int(getattr(parameters[name], "ds_numel", parameters[name].numel())) for name in groups.always_train)


def main(out: Path, runs: list[tuple]) -> None:
    from cluster.zero.engine import inference_engine, join
    from cluster.zero.shards import shards_of

    ranks = join()
    pieces.PIECE_BYTES = PIECE_BYTES
    arriving.BUCKET = BUCKET
    for name, case, stage, micro_batch_size in runs:
        model = MODELS[name]().eval()
        groups = groups_of(model, settings_for(case))
        largest = max(parameter.numel() for parameter in model.parameters())
        live = LiveGradients(model.parameters())
        num_micro = num_micro_batches(BATCH_SIZE, ranks.world_size, micro_batch_size)
        with seen(model, groups, rank_for(case, groups), seed=3) as view:
            # At the usual threshold stage 3 would keep a tiny model whole on every rank.
            engine = inference_engine(model, stage, persistence_threshold=0)
            measured = shards_of(engine, view.names, groups.always_train, num_micro, ranks)
            shards = view.shards(measured)
            before = weights_on_rank(measured)
            statistics, chosen, verdict = measure_case(model, shards, groups, case)
            restored = all(map(torch.equal, before, weights_on_rank(measured)))
        content = {
            "columns": statistics.columns,
            "elements": whole_elements(statistics, ranks),
            "chosen": chosen,
            "verdict": verdict,
            "options": statistics.options,
            "held": [sum(piece.length for piece in measured.slices)],
            "state_elements": sum(tensor.numel() for tensor in measured.trained_state() if tensor.ndim),
            "live_gradients": live.peak / largest,
            "always_trained": always_trained_elements(model, groups),
        }
        content["restored"] = ranks.all_gather_object(restored)
        content["held"] = ranks.all_gather_object(content["held"][0])
        if stage == 3:
            engine.destroy()
        if ranks.rank == 0:
            torch.save(content, out / f"{name}-{case}-{stage}-{micro_batch_size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), FAST if sys.argv[2] == "fast" else RUNS)
    leave()

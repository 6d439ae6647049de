"""Run under torchrun: steps whose loss or gradient is not finite, at every ZeRO stage.

``torchrun --nproc-per-node 2 -m tests.on_ranks.skips OUT fast`` writes the result of each case; ``every`` instead of
``fast`` adds those that only slow tests use.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from adapeft.data.batches import num_micro_batches
from adapeft.deltas.extract import extract_delta
from adapeft.tune.attach import attach
from tests.on_ranks.statistics import BATCH_SIZE
from tests.on_ranks.training import NUM_STEPS, engine_of, losses_of, subset_of, values_of
from tests.support.ranks import leave
from tests.support.tiny import make_bert

BAD_STEP = 2
# ZeRO stage, dtype, what is not finite, gradient clipping, micro-batch size
RUNS = [
    *((stage, "float32", "loss", 0.5, None) for stage in range(4)),
    *((stage, "float32", "gradient", 0.5, None) for stage in range(4)),
    *((stage, "float32", "gradient", None, 2) for stage in (0, 2, 3)),
    *((stage, "bfloat16", "loss", 0.5, 2) for stage in range(4)),
    *((stage, "bfloat16", "gradient", 0.5, None) for stage in range(4)),
]
FAST = [
    *((stage, "float32", "loss", 0.5, None) for stage in range(4)),
    *((stage, "float32", "gradient", 0.5, None) for stage in (0, 3)),
    (3, "float32", "gradient", None, 2),
    (2, "bfloat16", "loss", 0.5, 2),
    (3, "bfloat16", "gradient", 0.5, None),
]


def tag_of(run: tuple) -> str:
    return "-".join(map(str, run))


class Spoiling(torch.autograd.Function):
    """The identity with a gradient of NaN."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, float("nan"))


def spoilt(loss, what: str, is_here: bool):
    """Return a loss that is not finite, or whose gradient is not, on one rank only."""
    if not is_here:
        return loss
    if what == "loss":  # the gradient is finite: adding a constant does not change it
        return lambda model: loss(model) + float("inf")
    return lambda model: Spoiling.apply(loss(model))


def state_of(checkpoints) -> list[torch.Tensor]:
    """Return all tensors that an optimizer step changes on this rank."""
    return [
        tensor.clone() for place in checkpoints._places().values() for tensor in checkpoints._state(place.flat).values()
    ]


def main(out: Path, runs: list[tuple]) -> None:
    from cluster.ranks.finetune import full_value
    from cluster.zero.checkpoint import Checkpoints
    from cluster.zero.engine import join
    from cluster.zero.steps import FiniteSteps

    ranks = join()
    for run in runs:
        stage, dtype, what, clip, micro_batch_size = run
        found = {}
        for kind in ("spoilt", "without"):
            model = make_bert().to(getattr(torch, dtype)).eval()
            attach(model, subset_of(model, "rows"))
            num_micro = num_micro_batches(BATCH_SIZE, ranks.world_size, micro_batch_size)
            engine = engine_of(model, stage, num_micro, clip)
            steps, checkpoints = FiniteSteps(engine, ranks), Checkpoints(out / "none", engine, ranks)
            taken, rates, changed = [], [], False
            for step in range(NUM_STEPS):
                if step == BAD_STEP and kind == "without":
                    engine.lr_scheduler.step()
                    continue
                losses = losses_of(model, step, ranks, num_micro)
                if step == BAD_STEP:
                    before = state_of(checkpoints)
                    losses[-1] = spoilt(losses[-1], what, ranks.rank == ranks.world_size - 1)
                rates.append(engine.get_lr()[0])
                result = steps.take(losses)
                taken.append((result.is_taken, result.loss))
                if step == BAD_STEP:
                    after = state_of(checkpoints)
                    changed = not all(map(torch.equal, before, after))
            found[kind] = {
                "taken": taken,
                "rates": rates,
                "changed": any(ranks.all_gather_object(changed)),
                "values": values_of(extract_delta(model, full_value=full_value)),
            }
            engine.destroy()
        if ranks.rank == 0:
            torch.save(found, out / f"{tag_of(run)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), FAST if sys.argv[2] == "fast" else RUNS)
    leave()

"""Run under torchrun: rules at every ZeRO stage, in some cases stopped and resumed in the middle.

``torchrun --nproc-per-node 2 -m tests.on_ranks.rules OUT fast`` writes one file per model, case and stage;
``every`` instead of ``fast`` adds those that only slow tests use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from adapeft.data.batches import num_micro_batches
from adapeft.deltas.extract import extract_delta
from adapeft.tune.attach import attach
from tests.on_ranks.statistics import BATCH_SIZE, MODELS
from tests.on_ranks.training import losses_of
from tests.oracles.rules import CASES, CLIP, DECAY, LEARNING_RATE, NUM_STEPS, dense_subset, falling, make_model
from tests.support.ranks import leave

# model, case, ZeRO stage, micro-batch size, gradient checkpointing, step of a stop (0: none), persistence threshold
PROJECTING = ("child-pruning", "diff-pruning, structured")
RUNS = [
    *(("bert", case, 0, None, False, 0, 0) for case in (*PROJECTING, "child-tuning-f")),
    *(("bert", case, 1, None, False, 0, 0) for case in CASES),
    *(("gpt2", case, 2, 2, False, 0, 0) for case in PROJECTING),
    *(("gpt2", case, 3, 2, True, 0, 0) for case in CASES),
    *(("bert", case, 3, None, False, 0, 200) for case in PROJECTING),
    *(("bert", case, 2, None, False, 5, 0) for case in PROJECTING),
    *(("bert", case, 3, None, False, 5, 0) for case in CASES),
]
FAST = [
    *(("bert", case, 1, None, False, 0, 0) for case in CASES),
    *(("gpt2", case, 3, 2, True, 0, 0) for case in PROJECTING),
    ("bert", "child-pruning", 3, None, False, 0, 200),
    *(("bert", case, 3, None, False, 5, 0) for case in CASES),
]


def tag_of(run: tuple) -> str:
    return "-".join(map(str, run))


def start(name: str, case: str, stage: int, num_micro: int, checkpointing: bool, persistence: int):
    from cluster.zero.engine import training_engine

    model = make_model(MODELS[name])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attach(model, dense_subset(model, case))
    engine = training_engine(
        model,
        zero_stage=stage,
        num_micro=num_micro,
        learning_rate=LEARNING_RATE,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        schedule=lambda optimizer: LambdaLR(optimizer, falling),
        persistence_threshold=persistence,
    )
    return model, engine


def step_through(model: nn.Module, engine, follower, ranks, num_micro: int, steps: range) -> list[float]:
    means = []
    for step in steps:
        mean = torch.zeros(1)
        for loss in losses_of(model, step, ranks, num_micro):
            part = loss(engine)
            mean += part.detach()
            engine.backward(part * (ranks.world_size * num_micro))
            engine.step()
        follower.after_step()
        with follower.as_shipped():  # as at an evaluation, which the plain training does not have
            pass
        means.append(float(ranks.all_reduce(mean)))
    return means


def held_elements(engine, stage: int) -> int:
    """Return the number of elements of base parameters and leaves that this rank keeps between steps."""
    tensors = [p.ds_tensor if stage == 3 else p for p in engine.module.parameters()]
    return sum(tensor.numel() for tensor in tensors) + sum(p.numel() for p in engine.module.parameters() if stage == 3)


def train(run: tuple, ranks, full_value: Callable, folder: Path) -> dict:
    from cluster.zero.checkpoint import Checkpoints
    from cluster.zero.leaves import follow_in_engine
    from tests.on_ranks.statistics import optimizer_state_elements

    name, case, stage, micro_batch_size, checkpointing, stop, persistence = run
    num_micro = num_micro_batches(BATCH_SIZE, ranks.world_size, micro_batch_size)
    model, engine = start(name, case, stage, num_micro, checkpointing, persistence)
    follower = follow_in_engine(engine, model, ranks, NUM_STEPS, 0)
    losses = step_through(model, engine, follower, ranks, num_micro, range(stop or NUM_STEPS))
    if stop:
        Checkpoints(folder, engine, ranks).save(stop, {})
        engine.destroy()
        model, engine = start(name, case, stage, num_micro, checkpointing, persistence)
        Checkpoints(folder, engine, ranks).load()
        follower = follow_in_engine(engine, model, ranks, NUM_STEPS, stop)
        losses += step_through(model, engine, follower, ranks, num_micro, range(stop, NUM_STEPS))
    delta = extract_delta(model, full_value=full_value)
    content = {
        "delta": delta,
        "losses": losses,
        "held": ranks.all_gather_object(held_elements(engine, stage)),
        "state_elements": ranks.all_gather_object(optimizer_state_elements(engine)),
        "total": sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters()),
        "trained": sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad),
    }
    # The weights, and their float32 values, are equal to the shipped ones on all ranks and in the next forward.
    model.eval()
    with torch.no_grad():
        batch = [part(engine) for part in losses_of(model, 0, ranks, num_micro)]
    content["evaluated"] = float(ranks.all_reduce(torch.stack(batch).sum().reshape(1)))
    engine.destroy()
    return content


def main(out: Path, runs: list[tuple]) -> None:
    from cluster.ranks.finetune import full_value
    from cluster.zero.engine import join

    ranks = join()
    for run in runs:
        content = train(run, ranks, full_value, out / "checkpoints" / tag_of(run))
        if ranks.rank == 0:
            torch.save(content, out / f"{tag_of(run)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), FAST if sys.argv[2] == "fast" else RUNS)
    leave()

"""Run under torchrun: trains subsets of tiny models at every ZeRO stage, and counts the memory that it takes.

``torchrun --nproc-per-node 2 -m tests.on_ranks.training OUT fast`` writes one file per model, subset and stage;
``every`` instead of ``fast`` adds those that only slow tests use.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from adapeft.data.batches import num_micro_batches
from adapeft.deltas.delta import Delta
from adapeft.deltas.extract import extract_delta
from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_tensors, save_tensors
from adapeft.files.rank_files import rank_path
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.ranks import OneRank, Ranks
from adapeft.subset.subset import Subset
from adapeft.tasks.inference import infer_objective
from adapeft.tasks.losses import pieces
from adapeft.tasks.losses.micro_batches import micro_losses
from adapeft.tune.attach import attach
from tests.on_ranks.statistics import BATCH_SIZE, PIECE_BYTES, examples_of, joined
from tests.oracles.parts import MODELS, mixed_subset
from tests.support.ranks import leave
from tests.support.tiny import make_batches

LEARNING_RATE = 0.05
HEAD_RATE = 0.02
NUM_STEPS = 5
# Softmax does not depend on a bias of the keys: its gradient is rounding, to which Adam would apply full steps.
BLIND = ("key.bias", "c_attn.bias")
CASES = [(name, kind) for name in ("bert", "gpt2") for kind in ("tensor", "rows", "elements")]
CASES += [(name, "mixed") for name in MODELS]
# stage, micro-batch size, gradient checkpointing
STAGES = [(0, None, False), (1, None, False), (2, 2, False), (3, None, False), (3, 2, True)]
RUNS = [(*case, *stage) for case in CASES for stage in STAGES]
# All kinds and models where a stage has most to do, and BERT's but rows, which train as elements do, at every stage.
FAST = [run for run in RUNS if run[2:] == (3, 2, True) or (run[0] == "bert" and run[1] != "rows")]


def subset_of(model: nn.Module, kind: str) -> Subset:
    """Return a subset of about a tenth of the matrices' elements, a whole LayerNorm and the new head.

    Mixed subsets also have LoRA.
    """
    if kind == "mixed":
        return mixed_subset(model)
    parameters = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(7)
    parts: dict[str, Part] = {}
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        if parameter.ndim == 2 and ("layer" in name or ".h." in name or "word_emb" in name or "wte" in name):
            dim = 1 if ".c_" in name else 0
            if kind == "rows":
                rows = torch.randperm(shape[dim], generator=draw)[: max(1, shape[dim] // 6)].sort().values
                parts[name] = Rows(shape, rows, dim)
            elif kind == "elements":
                picks = torch.randperm(parameter.numel(), generator=draw)[: parameter.numel() // 10].sort().values
                parts[name] = Elements(shape, picks)
            elif "output" in name or "mlp" in name:
                parts[name] = Whole(shape)
        elif name.endswith(BLIND):
            continue
        elif kind == "elements" and parameter.ndim == 1 and "classifier" not in name:
            parts[name] = Elements(shape, torch.arange(0, shape[0], 3))
        elif "LayerNorm" in name or "ln_" in name:
            parts[name] = Whole(shape)
    new = tuple(name for name in parameters if name.startswith("classifier"))
    return Subset(parts, new, new)


def losses_of(model: nn.Module, step: int, ranks: Ranks, num_micro: int) -> list:
    order, examples = examples_of(model)
    objective = infer_objective(model, examples[0].labels)
    return micro_losses(
        order[step], lambda ids: joined(examples, ids), objective, ranks, num_micro, torch.device("cpu")
    )[0]


def engine_of(model: nn.Module, zero_stage: int, num_micro: int, max_grad_norm: float | None = 0.5):
    """Return a training engine with the settings of ``train_plainly``."""
    from cluster.zero.engine import training_engine

    return training_engine(
        model,
        zero_stage=zero_stage,
        num_micro=num_micro,
        learning_rate=LEARNING_RATE,
        head_learning_rate=HEAD_RATE,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        schedule=lambda optimizer: LambdaLR(optimizer, falling),
        persistence_threshold=0,
    )


def train_plainly(name: str, kind: str) -> dict[str, torch.Tensor]:
    """Train in plain torch: one process, AdamW with decay of matrices, a falling learning rate and clipping."""
    model = MODELS[name]().eval()
    attach(model, subset_of(model, kind))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    optimizer = torch.optim.AdamW(
        {
            "params": [parameter],
            "weight_decay": 0.1 if parameter.ndim > 1 else 0.0,
            "lr": HEAD_RATE if name.startswith("classifier") else LEARNING_RATE,
        }
        for name, parameter in named.items()
    )
    schedule = LambdaLR(optimizer, falling)
    for step in range(NUM_STEPS):
        for loss in losses_of(model, step, OneRank(), 1):
            loss(model).backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return values_of(extract_delta(model))


def values_of(delta: Delta) -> dict[str, torch.Tensor]:
    return {**{name: change.values for name, change in delta.changes.items()}, **delta.new}


@torch.no_grad()
def first_logits(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    return model(**make_batches(model)[0]).logits


def refusals(checkpoints, folder: Path, ranks: Ranks) -> list[str]:
    """Return the errors on loading a checkpoint without parameters, and one without its first file."""
    ranks.all_reduce(torch.zeros(1))  # another rank may still be reading the file of this rank
    path = rank_path(folder, ranks.rank, ranks.world_size)
    tensors, description = load_tensors(path, "training checkpoint")
    save_tensors(path, "training checkpoint", tensors, {**description, "parts": {}})
    said = []
    for _ in range(2):
        ranks.all_reduce(torch.zeros(1))
        with pytest.raises(AdapeftError) as error:
            checkpoints.load()
        said.append(str(error.value))
        ranks.all_reduce(torch.zeros(1))
        if ranks.rank == 0:
            path.unlink(missing_ok=True)
    return said


def falling(step: int) -> float:
    return 1 - step / NUM_STEPS


def main(out: Path, runs: list[tuple]) -> None:
    from cluster.ranks.finetune import full_value
    from cluster.zero.checkpoint import Checkpoints
    from cluster.zero.engine import join
    from tests.on_ranks.statistics import optimizer_state_elements

    ranks = join()
    pieces.PIECE_BYTES = PIECE_BYTES
    for name, kind, stage, micro_batch_size, checkpointing in runs:
        model = MODELS[name]()
        if checkpointing:
            # transformers recomputes only in training mode; without dropout this does not change results.
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(checkpointing)
        before = first_logits(model)
        attach(model, subset_of(model, kind))
        start_equal = torch.equal(first_logits(model), before)
        num_micro = num_micro_batches(BATCH_SIZE, ranks.world_size, micro_batch_size)
        engine = engine_of(model, stage, num_micro)

        def step(number: int, engine=engine, model=model, num_micro=num_micro) -> None:
            for loss in losses_of(model, number, ranks, num_micro):
                engine.backward(loss(engine) * (ranks.world_size * num_micro))
                engine.step()

        for number in range(NUM_STEPS):
            step(number)
        values = values_of(extract_delta(model, full_value=full_value))
        tag = f"{name}-{kind}-{stage}-{micro_batch_size}"
        folder = out / "checkpoints" / tag
        checkpoints = Checkpoints(folder, engine, ranks)
        checkpoints.save(NUM_STEPS, {"said": [0.1, tag]})
        states = sum(ranks.all_gather_object(optimizer_state_elements(engine)))
        held = [p for p in model.parameters() if not p.requires_grad and p.grad is not None]
        resumed, refused = {}, []
        if kind == "mixed":
            step(0)
            assert checkpoints.load() == {"said": [0.1, tag]}
            resumed = values_of(extract_delta(model, full_value=full_value))
            refused = refusals(checkpoints, folder / f"step-{NUM_STEPS}", ranks)
        engine.destroy()
        if ranks.rank == 0:
            content = {
                "values": values,
                "resumed": resumed,
                "refused": refused,
                "count": sum(value.numel() for value in values.values()),
                "start_equal": start_equal,
                "state_elements": states,
                "frozen_with_gradient": len(held),
                "checkpoint_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            }
            torch.save(content, out / f"{tag}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), FAST if sys.argv[2] == "fast" else RUNS)
    leave()

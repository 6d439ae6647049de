"""Memory of the logits: training and sampling labels with all logits at once and in pieces.

``python -m tests.benchmarks.vocabulary MODEL`` (MODEL: a causal language model) adds one row per setting to
``results/vocabulary.md``: batch, checkpointing, labels, pieces, GB before the first step and at the peak, seconds, and
the last loss, by which the two can be compared. Every row is a process of its own, which trains 0.1 % of the rows in
bfloat16 for a few steps on batches of random tokens, and reports its peak resident set size and the median processor
time of a step.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapeft.data.description import Batch
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from adapeft.tasks.losses import pieces
from adapeft.tasks.losses.cross_entropy import NextToken
from adapeft.tasks.losses.objective import Objective
from adapeft.tune.attach import attach

RESULTS = Path(__file__).parent / "results" / "vocabulary.md"
# Examples, tokens, gradient checkpointing.
SETTINGS = [(8, 128, False), (8, 1024, True)]
NUM_STEPS = 3
SHARE = 1000
WHOLE = 0
"""In place of the bytes of a piece: all logits at once."""


def main(model: str) -> None:
    """Measure each setting with all logits at once and in pieces, at true and at sampled labels."""
    for setting in SETTINGS:
        for samples in (False, True):
            cells = {size: measured(model, *setting, samples, size) for size in (WHOLE, pieces.PIECE_BYTES)}
            write(setting, samples, cells)


def write(setting: tuple[int, int, bool], samples: bool, cells: dict[int, dict[str, float]]) -> None:
    for size, cell in cells.items():
        row = [
            f"{setting[0]} x {setting[1]}",
            "yes" if setting[2] else "no",
            "sampled" if samples else "true",
            f"{size / 2**20:.0f} MiB" if size else "all",
            f"{cell['start']:.2f}",
            f"{cell['peak']:.2f}",
            f"{cell['seconds']:.1f}",
            f"{cell['loss']:.5f}",
        ]
        with RESULTS.open("a") as file:
            file.write(f"| {' | '.join(row)} |\n")


def measured(*arguments: object) -> dict[str, float]:
    """Train in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.vocabulary", *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.check_output(command).splitlines()[-1])
    return found


def train(
    name: str, num_examples: int, num_tokens: int, checkpointing: bool, samples: bool, size: int
) -> dict[str, float]:
    """Return GB before the first step and at the peak, processor seconds of a step, and the last mean loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    attach(model, subset_of(model))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = NextToken()
    loss_of = objective.loss if size else partial(Objective.loss, objective)
    pieces.PIECE_BYTES = size or pieces.PIECE_BYTES
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    start, seconds = peak(), []
    for step in range(NUM_STEPS):
        ids = torch.randint(3, model.config.vocab_size, (num_examples, num_tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch = Batch(inputs, ids, torch.arange(num_examples) + step * num_examples)
        begun = time.process_time()
        loss = loss_of(model, batch, sample_seed=step if samples else None) / objective.num_predictions(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begun)
    return {"start": start, "peak": peak(), "seconds": statistics.median(seconds), "loss": float(loss)}


def subset_of(model: PreTrainedModel) -> Subset:
    """Return every thousandth row of the matrices, those of the embeddings among them."""
    matrices = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim == 2}
    return Subset({name: Rows(shape, torch.arange(0, shape[0], SHARE), 0) for name, shape in matrices.items()})


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        name, examples, tokens, is_checkpointing, samples, size = sys.argv[1:]
        is_sampled = samples == "True"
        print(json.dumps(train(name, int(examples), int(tokens), is_checkpointing == "True", is_sampled, int(size))))

"""Projection discontinuity: the loss after every step of methods that re-project, compared with a fixed mask.

``python -m tests.benchmarks.discontinuity deploy/configs/cola.yaml model.name=DIR`` trains the methods one after the
other in this process and writes ``tests/benchmarks/results/discontinuity.md`` and ``.png``. The loss is that of fixed
training examples, without dropout: minibatch losses would hide the effect of a projection.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import get_linear_schedule_with_warmup

import adapeft
from adapeft.config.load import load_config
from adapeft.tune.attachment import attachment_of
from cluster.ranks.inputs import Inputs, load_inputs
from tests.benchmarks.report import RESULTS, machine

PROBED = 64
# method, learning rate, keys of select.rule
CURVES = {
    "sam, fixed mask": ("sam", 3e-3, {}),
    "child-pruning": ("child-pruning", 3e-4, {"projection_interval": 12}),
    "diff-pruning": ("diff-pruning", 3e-4, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=96)
    arguments = parser.parse_intermixed_args()
    inputs = load_inputs(load_config(arguments.config, arguments.overrides))
    curves = {name: train(inputs, arguments.steps, *curve) for name, curve in CURVES.items()}
    draw(curves)
    command = f"python -m tests.benchmarks.discontinuity {' '.join(sys.argv[1:])}"
    report = RESULTS / "discontinuity.md"
    report.write_text(
        f"# Projection discontinuity\n\n`{command}`\n\n{machine()}\n\nBudget {inputs.config.select.budget}, "
        f"{arguments.steps} steps of {inputs.config.train.batch_size}, one seed. Loss on {PROBED} fixed training "
        f"examples after every step, without dropout; a jump is its change over one step.\n\n{as_table(curves)}\n\n"
        f"![loss by step](discontinuity.png)\n"
    )
    print(report.read_text())


def train(
    inputs: Inputs, num_steps: int, method: str, learning_rate: float, rule: dict
) -> tuple[list[float], list[int], float]:
    """Return the losses before training and after every step, the steps followed by a projection, and the seconds."""
    config = inputs.config
    batches = list(inputs.training_batches(epoch=0))
    model = inputs.model()
    select = config.select
    subset = adapeft.select(
        model,
        [as_mapping(inputs, batch) for batch in batches[-16:]],
        method=method,
        budget=str(select.budget),
        include=list(select.include),
        exclude=list(select.exclude),
        rule=rule,
        seed=config.seed,
    )
    adapeft.attach(model, subset)
    optimizer = torch.optim.AdamW(adapeft.parameter_groups(model, learning_rate, config.train.weight_decay))
    kept_rule = attachment_of(model).rule
    adapeft.follow_rule(model, optimizer, num_steps=num_steps)
    schedule = get_linear_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    torch.manual_seed(config.seed)
    probe = [np.arange(start, start + 32) for start in range(0, PROBED, 32)]
    losses, started = [probed(model, inputs, probe)], time.perf_counter()
    for step in range(num_steps):
        model.train()
        model(**as_mapping(inputs, batches[step % len(batches)])).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(probed(model, inputs, probe))
        print(f"{method}: step {step + 1}, loss {losses[-1]:.4f}", flush=True)
    projections = [step for step in range(1, num_steps + 1) if kept_rule.projects_after(step, num_steps)]
    return losses, projections, time.perf_counter() - started


def as_mapping(inputs: Inputs, indices: np.ndarray) -> dict[str, torch.Tensor]:
    batch = inputs.train.collate(indices)
    return {**batch.inputs, "labels": batch.labels}


@torch.no_grad()
def probed(model: torch.nn.Module, inputs: Inputs, probe: list[np.ndarray]) -> float:
    model.eval()
    return float(np.mean([float(model(**as_mapping(inputs, indices)).loss) for indices in probe]))


def as_table(curves: dict[str, tuple[list[float], list[int], float]]) -> str:
    lines = [
        "| method | projections after steps | mean jump at a projection | mean jump elsewhere | largest jump elsewhere "
        "| first loss | last loss | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (losses, projections, seconds) in curves.items():
        jumps = np.diff(losses)
        at = np.isin(np.arange(1, len(losses)), projections)
        jump = f"{jumps[at].mean():+.4f}" if at.any() else "none"
        lines.append(
            f"| {name} | {', '.join(map(str, projections)) or 'none'} | {jump} | {jumps[~at].mean():+.4f} "
            f"| {jumps[~at].max():+.4f} | {losses[0]:.4f} | {losses[-1]:.4f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def draw(curves: dict[str, tuple[list[float], list[int], float]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name, (losses, projections, _) in curves.items():
        (line,) = axes.plot(losses, label=name, linewidth=1.2)
        axes.plot(projections, [losses[step] for step in projections], "v", color=line.get_color(), markersize=6)
    axes.set(xlabel="optimizer step", ylabel="loss on fixed training examples", title="▾ after a projection")
    axes.legend()
    figure.savefig(RESULTS / "discontinuity.png", dpi=130)


if __name__ == "__main__":
    main()

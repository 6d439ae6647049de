"""A subset chosen for MiniLM from its small sibling's statistics (layers 0, 2, 5), held against MiniLM's own choice.

``python -m tests.benchmarks.transfer --out runs/benchmarks/transfer`` takes the demo's data, measures the sibling and
MiniLM, transfers, trains what was chosen either way and at random, and writes ``tests/benchmarks/results/transfer.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from torch import nn
from transformers import AutoModel, AutoTokenizer

from deploy.demo.docstrings import model_folder
from tests.benchmarks.report import RESULTS, machine

CONFIG = "deploy/demo/demo.yaml"
LAYERS = (0, 2, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="0.5%")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    out, large = arguments.out, str(model_folder())

    small = out / "sibling"
    if not small.is_dir():
        write_sibling(large, small)
    budget = f"budget={arguments.budget}"
    if not (out / "small" / "subset.safetensors").is_file():
        call("select", CONFIG, f"model.name={small}", budget, f"output={out / 'small'}")
    found = out / "transferred"
    if not (found / "transfer.json").is_file():
        call("transfer", "--from", out / "small", "--to", large, budget, "verify=true", f"output={found}")
    verified = json.loads((found / "transfer.json").read_text())["verified"]

    choices = {
        "chosen on MiniLM": [f"train.subset={found / 'measured' / 'subset.safetensors'}"],
        "transferred": [f"train.subset={found / 'subset.safetensors'}"],
        "random rows": ["select.method=random"],
    }
    scores: dict[str, list[float]] = {name: [] for name in choices}
    for seed in range(arguments.seeds):
        for name, overrides in choices.items():
            output = out / f"{name.replace(' ', '-')}-{seed}"
            call("run", CONFIG, f"model.name={large}", budget, *overrides, f"seed={seed}", f"output={output}")
            metrics = json.loads((output / "metrics.json").read_text())
            scores[name].append(100 * metrics["last"]["accuracy"])
    write_report(arguments, verified, scores)


def write_sibling(large: str, folder: Path) -> None:
    """MiniLM with three of its six layers."""
    model = AutoModel.from_pretrained(large)
    model.encoder.layer = nn.ModuleList(model.encoder.layer[index] for index in LAYERS)
    model.config.num_hidden_layers = len(LAYERS)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(large).save_pretrained(folder)


def call(*arguments: object) -> None:
    subprocess.run(["adapeft", *map(str, arguments)], check=True)


def write_report(arguments: argparse.Namespace, verified: dict, scores: dict[str, list[float]]) -> None:
    held = {"chosen on MiniLM": {"captured": 1.0, "overlap": 1.0}, "random rows": verified["random"], **verified}
    lines = ["| subset | influence captured | overlap | accuracy, mean ± std | seeds |", "|---|---|---|---|---|"]
    for name in ("chosen on MiniLM", "transferred", "uniform", "random rows"):
        found = scores.get(name, [])
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        score = f"{statistics.mean(found):.2f} ± {spread:.2f} | {', '.join(f'{s:.1f}' for s in found)}"
        captured, overlap = held[name]["captured"], held[name]["overlap"]
        lines.append(f"| {name} | {captured:.3f} | {overlap:.3f} | {score if found else '– | –'} |")
    command = f"python -m tests.benchmarks.transfer {' '.join(sys.argv[1:])}"
    text = [
        "# A subset for MiniLM from its sibling of three layers",
        f"`{command}`",
        f"{machine()} The demo's task, rows, {arguments.budget}, two workers, ZeRO-3, one epoch.",
        "\n".join(lines),
        f"Spearman's correlation of foretold and measured densities of tensors: {verified['density_correlation']:.2f}.",
    ]
    report = RESULTS / "transfer.md"
    report.write_text("\n\n".join(text) + "\n")
    print(report.read_text())


if __name__ == "__main__":
    main()

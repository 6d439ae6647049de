"""A subset chosen for a large model from a small one's statistics, held against the large one's own choice.

``python -m tests.benchmarks.transfer minilm --out runs/benchmarks/minilm`` measures both sizes, transfers, trains what
was chosen either way and at random, and writes ``tests/benchmarks/results/transfer-minilm.md``; ``llama`` does the same
with language models (run ``make demo`` first: MiniLM's task is the demo's).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoModel, AutoTokenizer

from deploy.demo.docstrings import model_folder
from tests.benchmarks.language_model import train_language_model
from tests.benchmarks.report import RESULTS, machine

LAYERS = (0, 2, 5)


@dataclass(frozen=True)
class Pair:
    """Two sizes of one family and the task they are held against each other on."""

    title: str
    config: str
    budget: str
    metric: str
    write: Callable[[Path], tuple[Path, Path]]
    """Writes what is missing into a folder: the small model's folder and the large one's."""


def minilm(out: Path) -> tuple[Path, Path]:
    """MiniLM and the same with three of its six layers."""
    large, small = model_folder(), out / "sibling"
    if not (small / "config.json").is_file():
        model = AutoModel.from_pretrained(large)
        model.encoder.layer = nn.ModuleList(model.encoder.layer[index] for index in LAYERS)
        model.config.num_hidden_layers = len(LAYERS)
        AutoTokenizer.from_pretrained(large).save_pretrained(small)
        model.save_pretrained(small)
    return small, large


def llama(out: Path) -> tuple[Path, Path]:
    """Llamas of two layers 128 wide and of four layers 192 wide, each trained for minutes."""
    small, large = out / "2x128", out / "4x192"
    for folder, layers, width in ((small, 2, 128), (large, 4, 192)):
        if not (folder / "config.json").is_file():
            train_language_model(folder, num_steps=1000, layers=layers, width=width)
    return small, large


PAIRS = {
    "minilm": Pair(
        title="A subset for MiniLM from its sibling of three layers, on the demo's task",
        config="deploy/demo/demo.yaml",
        budget="0.5%",
        metric="accuracy",
        write=minilm,
    ),
    "llama": Pair(
        title="A subset for a Llama of four layers 192 wide from one of two layers 128 wide, on WikiText-2",
        config="deploy/configs/wikitext2.yaml",
        budget="2%",
        metric="perplexity",
        write=llama,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="key=value of the runs' config")
    arguments = parser.parse_intermixed_args()
    pair, out = PAIRS[arguments.pair], arguments.out

    small, large = pair.write(out)
    budget, common = f"budget={pair.budget}", arguments.overrides
    if not (out / "small" / "subset.safetensors").is_file():
        call("select", pair.config, f"model.name={small}", budget, *common, f"output={out / 'small'}")
    found = out / "transferred"
    if not (found / "transfer.json").is_file():
        call("transfer", "--from", out / "small", "--to", large, budget, "verify=true", f"output={found}")
    verified = json.loads((found / "transfer.json").read_text())["verified"]

    choices = {
        "chosen on the large model": [f"train.subset={found / 'measured' / 'subset.safetensors'}"],
        "transferred": [f"train.subset={found / 'subset.safetensors'}"],
        "random": ["select.method=random"],
    }
    scores: dict[str, list[float]] = {name: [] for name in choices}
    for seed in range(arguments.seeds):
        for name, overrides in choices.items():
            output = out / f"{name.replace(' ', '-')}-{seed}"
            run = (f"model.name={large}", budget, *common, *overrides, f"seed={seed}", f"output={output}")
            call("run", pair.config, *run)
            metrics = json.loads((output / "metrics.json").read_text())
            scores[name].append(metrics["last"][pair.metric])
    write_report(arguments.pair, verified, scores)


def call(*arguments: object) -> None:
    subprocess.run(["adapeft", *map(str, arguments)], check=True)


def write_report(name: str, verified: dict, scores: dict[str, list[float]]) -> None:
    pair = PAIRS[name]
    held = {"chosen on the large model": {"captured": 1.0, "overlap": 1.0}, **verified}
    lines = [
        f"| subset | influence captured | overlap | {pair.metric}, mean ± std | seeds |",
        "|---|---|---|---|---|",
    ]
    for choice in ("chosen on the large model", "transferred", "uniform", "random"):
        found = scores.get(choice, [])
        score = f"{statistics.mean(found):.4g} ± {statistics.stdev(found):.2g}" if len(found) > 1 else "–"
        captured, overlap = held[choice]["captured"], held[choice]["overlap"]
        seeds = ", ".join(f"{s:.4g}" for s in found) or "–"
        lines.append(f"| {choice} | {captured:.3f} | {overlap:.3f} | {score} | {seeds} |")
    text = [
        f"# {pair.title}",
        f"`python -m tests.benchmarks.transfer {' '.join(sys.argv[1:])}`",
        f"{machine()} Rows, {pair.budget}, two workers, ZeRO-3.",
        "\n".join(lines),
        f"Spearman's correlation of foretold and measured densities of tensors: {verified['density_correlation']:.2f}.",
    ]
    report = RESULTS / f"transfer-{name}.md"
    report.write_text("\n\n".join(text) + "\n")
    print(report.read_text())


if __name__ == "__main__":
    main()

"""A small language model on WikiText-2: trained from scratch for minutes, then measured and tuned under ZeRO-3.

``python -m tests.benchmarks.wikitext2 --out runs/benchmarks/wikitext2`` trains a byte-pair tokenizer and a Llama on the
first half of the training text, runs ``adapeft run deploy/configs/wikitext2.yaml`` once for each method on all of it,
and writes ``tests/benchmarks/results/wikitext2.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.language_model import train_language_model, unigram_perplexity
from tests.benchmarks.report import RESULTS, machine

CONFIG = "deploy/configs/wikitext2.yaml"
METHODS = {
    "adapeft, rows": ["select.groups=row"],
    "random, rows": ["select.method=random", "select.groups=row"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the base model")
    arguments = parser.parse_args()

    base = arguments.out / "base"
    if not (base / "config.json").is_file():
        train_language_model(base, arguments.steps)
    lines = ["| method | perplexity before | after | trained | of | influence | gap |", "|" + "---|" * 7]
    for name, overrides in METHODS.items():
        output = arguments.out / name.replace(", ", "-")
        command = ["adapeft", "run", CONFIG, f"model.name={base}", f"output={output}", *overrides]
        subprocess.run(command, check=True)
        lines.append(as_row(name, json.loads((output / "metrics.json").read_text())))
    text = [
        "# wikitext2",
        f"`python -m tests.benchmarks.wikitext2 {' '.join(sys.argv[1:])}`",
        f"{machine()} Two workers, ZeRO-3.",
        "\n".join(lines),
        f"Token frequencies alone have a perplexity of {unigram_perplexity(base):.0f}.",
    ]
    report = RESULTS / "wikitext2.md"
    report.write_text("\n\n".join(text) + "\n")
    print(report.read_text())


def as_row(name: str, metrics: dict) -> str:
    """Return the table row of a run."""
    choice = metrics["choice"]
    influence = "–" if choice["value"] is None else f"{choice['value']:.4g}"
    gap = "–" if choice["gap"] is None else f"{choice['gap']:.1e}"
    return (
        f"| {name} | {metrics['before']['perplexity']:.1f} | {metrics['after']['perplexity']:.1f} "
        f"| {metrics['trainable_parameters']:,} | {metrics['total_parameters']:,} | {influence} | {gap} |"
    )


if __name__ == "__main__":
    main()

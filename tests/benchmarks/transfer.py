"""A subset transferred from a small model's statistics to a large model, compared with the large model's own choice.

``python -m tests.benchmarks.transfer minilm --out runs/benchmarks/minilm`` measures both sizes, the large one twice,
transfers, trains the transferred, own and random subsets, and writes ``tests/benchmarks/results/transfer-minilm.md``;
``llama`` does the same with language models. MiniLM is trained on the demo's task: run ``make demo`` first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoModel, AutoTokenizer

from adapeft.config.experiments import Transfer
from adapeft.config.load import load_config
from adapeft.measure.storage import load_statistics
from adapeft.methods.registry import ValuedMethod, get_method
from adapeft.sections.budget import Budget
from adapeft.subset.subset import Subset
from adapeft.transfer.verify import agreement, uniform_subset
from cluster.commands.compare.machines.local import Machines
from cluster.commands.transfer.transfer import target_config, transfer
from deploy.demo.docstrings import model_folder
from tests.benchmarks.language_model import train_language_model
from tests.benchmarks.report import RESULTS, machine

LAYERS = (0, 2, 5)
SUBSET = "subset.safetensors"


@dataclass(frozen=True)
class Pair:
    """Two sizes of a model family, and the task on which they are compared."""

    title: str
    config: str
    budget: str
    metric: str
    write: Callable[[Path], tuple[Path, Path]]
    """Function that writes missing models into a folder and returns the folders of the small and the large model."""
    overrides: tuple[str, ...] = ()


def minilm(out: Path) -> tuple[Path, Path]:
    """Return the folders of MiniLM with three of its six layers, and of MiniLM."""
    large, small = model_folder(), out / "sibling"
    if not (small / "config.json").is_file():
        model = AutoModel.from_pretrained(large)
        model.encoder.layer = nn.ModuleList(model.encoder.layer[index] for index in LAYERS)
        model.config.num_hidden_layers = len(LAYERS)
        AutoTokenizer.from_pretrained(large).save_pretrained(small)
        model.save_pretrained(small)
    return small, large


def llama(out: Path) -> tuple[Path, Path]:
    """Return the folders of Llamas with two layers of width 128 and four of width 192, each trained for minutes."""
    small, large = out / "2x128", out / "4x192"
    for folder, layers, width in ((small, 2, 128), (large, 4, 192)):
        if not (folder / "config.json").is_file():
            train_language_model(folder, num_steps=1000, layers=layers, width=width)
    return small, large


PAIRS = {
    "minilm": Pair(
        title="A subset for MiniLM from MiniLM with three layers, on the demo's task",
        config="deploy/demo/demo.yaml",
        budget="0.5%",
        metric="accuracy",
        write=minilm,
        overrides=("groups=row", "train.learning_rate=3e-3", "head_learning_rate=null"),
    ),
    "llama": Pair(
        title="A subset for a Llama with four layers of width 192 from one with two of width 128, on WikiText-2",
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
    parser.add_argument("--parallel", type=int, default=2, help="number of concurrent trainings")
    parser.add_argument("overrides", nargs="*", help="key=value overrides of the config of the runs")
    arguments = parser.parse_intermixed_args()
    pair, out = PAIRS[arguments.pair], arguments.out

    small, large = pair.write(out)
    common = [f"budget={pair.budget}", *pair.overrides, *arguments.overrides]
    once("select", out / "small", pair.config, f"model.name={small}", *common)
    once("select", out / "large", pair.config, f"model.name={large}", *common)
    once("select", out / "again", pair.config, f"model.name={large}", *common, "seed=1000")
    for inside in ("weight-norm", "gradient", "slope"):
        onto = ("--from", out / "small", "--to", large)
        once("transfer", out / inside, *onto, f"budget={pair.budget}", f"inside={inside}")

    write_uniform(out / "uniform", out / "small", large, pair.budget)

    choices = {
        "chosen on the large model": [f"train.subset={out / 'large' / SUBSET}"],
        "transferred, own slopes": [f"train.subset={out / 'slope' / SUBSET}"],
        "transferred, one gradient pass": [f"train.subset={out / 'gradient' / SUBSET}"],
        "transferred, by weight norm": [f"train.subset={out / 'weight-norm' / SUBSET}"],
        "uniform, by weight norm": [f"train.subset={out / 'uniform' / SUBSET}"],
        "random": ["select.method=random"],
    }

    def train(name: str, seed: int) -> float:
        output = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        here = [f"model.name={large}", f"seed={seed}", f"output={output}", "cluster.workers=1"]
        metrics, failure = Machines().run(load_config(Path(pair.config), [*here, *common, *choices[name]]))
        assert metrics is not None, failure
        return metrics["last"][pair.metric]

    with ThreadPoolExecutor(arguments.parallel) as pool:
        found = {name: [pool.submit(train, name, seed) for seed in range(arguments.seeds)] for name in choices}
        scores = {name: [run.result() for run in runs] for name, runs in found.items()}
    held = {
        "chosen on the large model": out / "large" / SUBSET,
        "the same, measured again": out / "again" / SUBSET,
        "transferred, own slopes": out / "slope" / SUBSET,
        "transferred, one gradient pass": out / "gradient" / SUBSET,
        "transferred, by weight norm": out / "weight-norm" / SUBSET,
        "uniform, by weight norm": out / "uniform" / SUBSET,
        "random": out / "random-0" / SUBSET,
    }
    write_report(arguments.pair, held, out, scores)


def once(command: str, output: Path, *arguments: object) -> None:
    """Run a command, unless an earlier run of this benchmark has done it."""
    if not (output / SUBSET).is_file():
        call(command, *arguments, f"output={output}")


def call(*arguments: object) -> None:
    subprocess.run(["adapeft", *map(str, arguments)], check=True)


def write_uniform(output: Path, small: Path, large: Path, budget: str) -> None:
    """Save a subset with the same share of every tensor, of the rows with the largest weight norms."""
    settings = Transfer(budget=Budget.parse(budget), inside="weight-norm")
    found = transfer(small, target_config(small, str(large), settings, []), settings)
    assert found.scores is not None
    said = {key: value for key, value in found.subset.choice.recorded().items() if key != "transferred"}
    output.mkdir(exist_ok=True)
    uniform_subset(found.groups, int(said["budget"]), found.scores).described(**said).save(output / SUBSET)


def write_report(name: str, held: dict[str, Path], out: Path, scores: dict[str, list[float]]) -> None:
    """Write the results, with the influence by two measurements.

    The measurement that the large model's subset was chosen by is biased in favor of that subset.
    """
    pair = PAIRS[name]
    subsets = {choice: Subset.load(path) for choice, path in held.items()}
    best, again = subsets["chosen on the large model"], subsets["the same, measured again"]
    lines = [
        f"| subset | influence captured | by the second measurement | overlap | {pair.metric}, mean ± std | seeds |",
        "|---|---|---|---|---|---|",
    ]
    measured = [load_statistics(out / folder)[0] for folder in ("large", "again")]
    reach = float(best.choice.needed("reach"))
    method = get_method("adapeft")
    assert isinstance(method, ValuedMethod)
    for choice, subset in subsets.items():
        first, second = (
            agreement(found_there, method, reach, subset, own)
            for found_there, own in zip(measured, (best, again), strict=True)
        )
        found = scores.get(choice, [])
        score = f"{statistics_of(found)} | {', '.join(f'{s:.4g}' for s in found)}" if found else "– | –"
        lines.append(f"| {choice} | {first.captured:.3f} | {second.captured:.3f} | {first.overlap:.3f} | {score} |")
    text = [
        f"# {pair.title}",
        f"`python -m tests.benchmarks.transfer {' '.join(sys.argv[1:])}`",
        f"{machine()} Rows, {pair.budget}, ZeRO-3; chosen by two workers, trained by one.",
        "\n".join(lines),
    ]
    report = RESULTS / f"transfer-{name}.md"
    report.write_text("\n\n".join(text) + "\n")
    print(report.read_text())


def statistics_of(scores: list[float]) -> str:
    """Format the mean and the sample standard deviation."""
    return f"{statistics.mean(scores):.4g} ± {statistics.stdev(scores):.2g}" if len(scores) > 1 else f"{scores[0]:.4g}"


if __name__ == "__main__":
    main()

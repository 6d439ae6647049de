"""Methods on one config, seed by seed, each through ``adapeft run``; a table of mean and standard deviation.

``python -m tests.benchmarks.methods deploy/configs/cola.yaml --out runs/benchmarks/cola model.name=DIR`` runs what is
not there yet and writes ``tests/benchmarks/results/cola.md``. A run that was interrupted is taken up again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

VARIANTS = {
    "adapeft, tensors": ["select.method=adapeft", "select.groups=tensor"],
    "adapeft, rows": ["select.method=adapeft", "select.groups=row"],
    "adapeft, elements": ["select.method=adapeft", "select.groups=element"],
    "sam, elements": ["select.method=sam", "select.groups=element"],
    "random, elements": ["select.method=random", "select.groups=element"],
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for every run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="runs at once")
    arguments = parser.parse_intermixed_args()

    jobs = [(name, seed) for seed in range(arguments.seeds) for name in VARIANTS]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        metrics = dict(zip(jobs, pool.map(lambda job: run_once(arguments, *job), jobs), strict=True))
    table = as_table({name: [metrics[name, seed] for seed in range(arguments.seeds)] for name in VARIANTS})
    command = f"python -m tests.benchmarks.methods {' '.join(sys.argv[1:])}"
    report = RESULTS / f"{arguments.config.stem}.md"
    report.write_text(f"# {arguments.config.stem}\n\n`{command}`\n\n{machine()}\n\n{table}\n")
    print(report.read_text())


def run_once(arguments: argparse.Namespace, name: str, seed: int) -> dict:
    """Metrics of one run, from its folder if it is finished."""
    output = arguments.out / f"{name.replace(', ', '-')}-{seed}"
    overrides = [*VARIANTS[name], *arguments.overrides, f"seed={seed}", f"output={output}"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / f"{output.name}.log").open("a") as log:
        done = subprocess.run(
            ["adapeft", "run", str(arguments.config), *overrides], stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed} failed: see {output}.log")
    return json.loads((output / "metrics.json").read_text())


def as_table(runs: dict[str, list[dict]]) -> str:
    """A row a variant: scores of every seed, their mean and standard deviation."""
    metric = next(iter(runs.values()))[0]["metric"]
    lines = [
        f"| method | {metric}, mean ± std | seeds | last step's | parameters | delta KiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        scores = [100 * result["after"][metric] for result in results]
        last = statistics.mean(100 * result["last"][metric] for result in results)
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        lines.append(
            f"| {name} | {statistics.mean(scores):.2f} ± {spread:.2f} | {', '.join(f'{s:.1f}' for s in scores)} "
            f"| {last:.2f} | {results[0]['trainable_parameters']:,} | {results[0]['delta_bytes'] / 1024:.0f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("adapeft", "torch", "transformers", "deepspeed", "ray"))
    return f"{platform.machine()}, Python {platform.python_version()}, {packages}."


if __name__ == "__main__":
    main()

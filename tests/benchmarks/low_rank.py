"""Low-rank and exact measurements compared: what their choices capture on other examples, time and memory.

``python -m tests.benchmarks.low_rank CONFIG --out DIR [key=value …]`` runs ``adapeft select`` exactly, through windows
of each rank, and exactly once more with other calibration examples, which judge all choices: a choice captures the
influence of its groups there, as a share of what the exact choice captures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from adapeft.choose.knapsack import chosen_of
from adapeft.measure.storage import load_groups
from adapeft.methods.registry import get_method
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder

RANKS = (8, 16, 32)


def main() -> None:
    """Run what is missing in the output folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("overrides", nargs="*", help="key=value of the runs' config")
    arguments = parser.parse_intermixed_args()
    runs = {"exact": ["measure=exact"]}
    runs |= {f"rank {rank}": ["measure=low-rank", f"rank={rank}"] for rank in arguments.ranks}
    for name, own in runs.items():
        _select(arguments, name, *own)
    _select(arguments, "judge", "measure=exact", "seed=1000")
    judged = _values(arguments.out / "judge")
    exact = _captured(arguments.out / "exact", judged)
    print("| measurement | captured | rank correlation with the judge | seconds | peak memory |")
    print("|---|---|---|---|---|")
    for name in runs:
        folder = arguments.out / name
        share = _captured(folder, judged) / exact
        correlation = float(spearmanr(_values(folder), judged).statistic)
        metrics = json.loads(RunFolder(folder).metrics.read_text())
        seconds, peak = metrics["seconds"]["select"], metrics["measuring_peak_memory_bytes"] / 2**20
        print(f"| {name} | {share:.3f} | {correlation:.3f} | {seconds:.0f} | {peak:,.0f} MiB |", flush=True)


def _select(arguments: argparse.Namespace, name: str, *own: str) -> None:
    folder = arguments.out / name
    if not RunFolder(folder).subset.is_file():
        command = ["adapeft", "select", arguments.config, *arguments.overrides, *own, f"output={folder}"]
        subprocess.run([*map(str, command)], check=True)


def _values(folder: Path) -> np.ndarray:
    """Return the influence of every group."""
    _, columns, _ = load_groups(folder)
    reach = float(Subset.load(RunFolder(folder).subset).choice.needed("reach"))
    values = get_method("adapeft").values(columns, reach)  # type: ignore[attr-defined]
    return np.asarray(values)


def _captured(folder: Path, judged: np.ndarray) -> float:
    groups, _, _ = load_groups(folder)
    return float(judged[chosen_of(groups, Subset.load(RunFolder(folder).subset)) > 0].sum())


if __name__ == "__main__":
    main()

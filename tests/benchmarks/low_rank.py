"""Low-rank and exact measurements compared: what their choices capture on other examples, time and memory.

``python -m tests.benchmarks.low_rank CONFIG --out DIR [key=value …]`` runs ``adapeft select`` for each seed exactly and
through windows of each rank. A choice is judged by the exact measurements of the other seeds, whose calibration
examples are others: it captures the influence of its groups (or elements) there, as a share of what the exact choice
captures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from adapeft.measure.storage import load_statistics
from adapeft.methods.registry import get_method
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder

RANKS = (8, 16, 32)
SEEDS = (0, 1, 2)


def main() -> None:
    """Run what is missing in the output folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("overrides", nargs="*", help="key=value of the runs' config")
    arguments = parser.parse_intermixed_args()
    runs = {"exact": ["measure=exact"]}
    runs |= {f"rank {rank}": ["measure=low-rank", f"rank={rank}"] for rank in arguments.ranks}
    for name, own in runs.items():
        for seed in arguments.seeds:
            _select(arguments, _folder(arguments, name, seed), *own, f"seed={seed}")
    values = {seed: _values(_folder(arguments, "exact", seed)) for seed in arguments.seeds}
    print("| measurement | captured | from | to | rank correlation with the judges | seconds | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for name in runs:
        shares, correlations = [], []
        for seed, judge in permutations(arguments.seeds, 2):
            folder, judged = _folder(arguments, name, seed), values[judge]
            shares.append(_captured(folder, judged) / _captured(_folder(arguments, "exact", seed), judged))
            correlations.append(float(spearmanr(_values(folder), judged).statistic))
        metrics = [
            json.loads(RunFolder(_folder(arguments, name, seed)).metrics.read_text()) for seed in arguments.seeds
        ]
        seconds = np.mean([one["seconds"]["select"] for one in metrics])
        peak = max(one["measuring_peak_memory_bytes"] for one in metrics) / 2**20
        print(
            f"| {name} | {np.mean(shares):.3f} | {min(shares):.2f} | {max(shares):.2f} | {np.mean(correlations):.3f} "
            f"| {seconds:.0f} | {peak:,.0f} MiB |",
            flush=True,
        )


def _folder(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    return arguments.out / f"{name}, seed {seed}"


def _select(arguments: argparse.Namespace, folder: Path, *own: str) -> None:
    if not RunFolder(folder).subset.is_file():
        command = ["adapeft", "select", arguments.config, *arguments.overrides, *own, f"output={folder}"]
        subprocess.run([*map(str, command)], check=True)


def _values(folder: Path) -> np.ndarray:
    """Return the influence of every group or, by element, of every element."""
    statistics, _ = load_statistics(folder)
    reach = float(Subset.load(RunFolder(folder).subset).choice.needed("reach"))
    value = partial(get_method("adapeft").value, reach=reach)  # type: ignore[attr-defined]
    parameters = range(len(statistics.groups.parameters))
    return torch.cat([statistics.values_of(parameter, value) for parameter in parameters]).numpy()


def _captured(folder: Path, judged: np.ndarray) -> float:
    statistics, _ = load_statistics(folder)
    groups, subset = statistics.groups, Subset.load(RunFolder(folder).subset)
    chosen = [
        subset.parts[info.name].mask().numpy() if info.name in subset.parts else np.zeros(info.count, dtype=bool)
        for info in groups.parameters
    ]
    if groups.granularity != "element":
        chosen = [
            groups.sums(index, 0, torch.from_numpy(mask).float())[1].numpy() > 0 for index, mask in enumerate(chosen)
        ]
    return float(judged[np.concatenate(chosen)].sum(dtype=np.float64))


if __name__ == "__main__":
    main()

"""Low-rank and exact measurements compared: what their choices capture on other examples, and their processor time.

``python -m tests.benchmarks.low_rank CONFIG --out DIR [key=value …]`` chooses as ``adapeft select`` with one worker
does, in this process, for each seed exactly and through windows of each rank. A choice is judged by the exact
measurements of the other seeds, whose calibration examples are others: it captures the influence that its groups (or
elements) have there, jointly where they were chosen jointly, as a share of what the exact choice captures. With
``--statistics DIR``, the output folder of an earlier comparison, only the choices are made again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from adapeft.config.load import load_config
from adapeft.files.artifact import save_json
from adapeft.measure.influence import influence
from adapeft.measure.statistics import Statistics, Value
from adapeft.measure.storage import load_statistics
from adapeft.methods.registry import get_method
from adapeft.ranks import OneRank
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from cluster.events import ignore
from cluster.output.folder import RunFolder
from cluster.ranks.choose import choose_and_save
from cluster.ranks.inputs import load_inputs
from cluster.ranks.measure import measure_and_choose
from tests.benchmarks.cross_terms import be_the_only_rank

RANKS = (8, 16, 32)
SEEDS = (0, 1, 2)
_RANKED = 10**6
"""Number of drawn elements whose ranks are correlated, if there are more."""


def main() -> None:
    """Run what is missing in the output folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("overrides", nargs="*", help="key=value of the runs' config")
    arguments = parser.parse_intermixed_args()
    be_the_only_rank()
    runs = {"exact": ["measure=exact"]}
    runs |= {f"rank {rank}": ["measure=low-rank", f"rank={rank}"] for rank in arguments.ranks}
    for name, own in runs.items():
        for seed in arguments.seeds:
            _select(arguments, name, seed, *own)
    judges = {seed: _Judge.of(arguments, seed) for seed in arguments.seeds}
    exact = {seed: _chosen(arguments, "exact", seed) for seed in arguments.seeds}
    print("| measurement | captured | from | to | rank correlation with the judges | processor seconds |")
    print("|---|---|---|---|---|---|")
    for name in runs:
        shares, correlations = [], []
        for seed in arguments.seeds:
            values, chosen = _values(arguments, name, seed), _chosen(arguments, name, seed)
            for judge in (judges[other] for other in arguments.seeds if other != seed):
                shares.append(judge.captured(chosen) / judge.captured(exact[seed]))
                correlations.append(_correlation(values, judge.influence))
        metrics = [
            json.loads(RunFolder(_measured(arguments, name, seed)).metrics.read_text()) for seed in arguments.seeds
        ]
        seconds = np.mean([one["seconds"]["select"] for one in metrics])
        print(
            f"| {name} | {np.mean(shares):.3f} | {min(shares):.2f} | {max(shares):.2f} | {np.mean(correlations):.3f} "
            f"| {seconds:.0f} |",
            flush=True,
        )


@dataclass(frozen=True)
class _Judge:
    """The exact measurement of a seed.

    Attributes:
        influence: influence of every group or element.
        slope, root: slope b and √A of every element; None unless elements were chosen jointly.
        reach: reach of the training.
    """

    influence: np.ndarray
    slope: np.ndarray | None
    root: np.ndarray | None
    reach: float

    @classmethod
    def of(cls, arguments: argparse.Namespace, seed: int) -> _Judge:
        statistics, choice = _measurement(arguments, "exact", seed)
        reach, slope, root = float(choice.needed("reach")), None, None
        if choice.granularity == "element" and choice.unspent is not None:
            slope = _of_all(statistics, itemgetter("slope"))
            root = _of_all(statistics, lambda columns: columns["curvature"].sqrt())
        return cls(_influence(statistics, reach), slope, root, reach)

    def captured(self, chosen: np.ndarray) -> float:
        """Return the influence that the chosen groups, a mask, have together."""
        if self.slope is None or self.root is None:
            return float(self.influence[chosen].sum(dtype=np.float64))
        slope, root = (torch.tensor(column[chosen].sum(dtype=np.float64)) for column in (self.slope, self.root))
        return float(influence(slope, root**2, self.reach))


def _folder(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    return arguments.out / f"{name}, seed {seed}"


def _measured(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    """Return the folder of the run that has measured."""
    return (arguments.statistics or arguments.out) / _folder(arguments, name, seed).name


def _select(arguments: argparse.Namespace, name: str, seed: int, *own: str) -> None:
    folder = RunFolder(_folder(arguments, name, seed))
    if folder.subset.is_file():
        return
    config = load_config(
        arguments.config, ["select.fill=false", *arguments.overrides, *own, f"seed={seed}", f"output={folder.path}"]
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    if arguments.statistics:
        statistics, _ = load_statistics(_measured(arguments, name, seed))
        choose_and_save(config, {}, statistics, len(load_inputs(config).train), OneRank(), None)
    else:
        measure_and_choose(config, ignore)
    seconds = time.process_time() - start
    save_json(folder.metrics, {"seconds": {"select": seconds}})
    print(f"{name}, seed {seed}: {seconds:.0f} processor seconds", flush=True)


def _measurement(arguments: argparse.Namespace, name: str, seed: int) -> tuple[Statistics, Choice]:
    statistics, _ = load_statistics(_measured(arguments, name, seed))
    return statistics, Subset.load(RunFolder(_folder(arguments, name, seed)).subset).choice


def _values(arguments: argparse.Namespace, name: str, seed: int) -> np.ndarray:
    """Return the influence of every group or, by element, of every element."""
    statistics, choice = _measurement(arguments, name, seed)
    return _influence(statistics, float(choice.needed("reach")))


def _influence(statistics: Statistics, reach: float) -> np.ndarray:
    return _of_all(statistics, partial(get_method("adapeft").value, reach=reach))  # type: ignore[attr-defined]


def _of_all(statistics: Statistics, value: Value) -> np.ndarray:
    parameters = range(len(statistics.groups.parameters))
    return torch.cat([statistics.values_of(parameter, value) for parameter in parameters]).numpy()


def _chosen(arguments: argparse.Namespace, name: str, seed: int) -> np.ndarray:
    """Return whether each group or element was chosen."""
    statistics, _ = load_statistics(_measured(arguments, name, seed))
    groups, subset = statistics.groups, Subset.load(RunFolder(_folder(arguments, name, seed)).subset)
    chosen = [
        subset.parts[info.name].mask().numpy() if info.name in subset.parts else np.zeros(info.count, dtype=bool)
        for info in groups.parameters
    ]
    if groups.granularity != "element":
        chosen = [
            groups.sums(index, 0, torch.from_numpy(mask).float())[1].numpy() > 0 for index, mask in enumerate(chosen)
        ]
    return np.concatenate(chosen)


def _correlation(values: np.ndarray, judged: np.ndarray) -> float:
    """Return Spearman's rank correlation."""
    if len(values) > _RANKED:
        drawn = np.random.default_rng(0).choice(len(values), _RANKED, replace=False, shuffle=False)
        values, judged = values[drawn], judged[drawn]
    return float(spearmanr(values, judged).statistic)


if __name__ == "__main__":
    main()

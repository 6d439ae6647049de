"""The report of a comparison: a table, plots, and a test of each method against a random choice."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison
from adapeft.files.artifact import provenance, save_json, save_text
from adapeft.files.json_numbers import undefined_as_null
from cluster.commands.compare.output.pictures import pictures_of
from cluster.commands.compare.output.row import Row, rows_of
from cluster.commands.compare.output.table import cells_of, table
from cluster.commands.compare.run import Run, num_runs, primary_metric
from cluster.output.pictures.page import figure, grid, page_of, paragraphs
from cluster.output.pictures.picture import save_pictures
from cluster.output.report import title_of

BASELINE = "random"


def against(row: Row, baseline: Row, higher_is_better: bool) -> str:
    """Describe how ``row`` compares with the baseline on their common seeds (exact sign-flip test of the pairs).

    With n seeds the smallest two-sided p of that test is 2 / 2ⁿ, so fewer than six seeds cannot reach 0.05 whatever the
    scores; the paired t-test, which assumes normal differences, is given next to it.
    """
    seeds = sorted(row.scores.keys() & baseline.scores.keys())
    differences = np.array([row.scores[seed] - baseline.scores[seed] for seed in seeds])
    if len(seeds) < 2:
        return "only one pair of runs, so no test"
    mean = differences.mean()
    word = "better" if (mean > 0) == higher_is_better else "worse"
    if np.ptp(differences) == 0:
        return f"{abs(mean):.4g} {word} on every seed" if mean else "equal on every seed"
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    exact = float(
        stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    )
    verdict = "" if p < 0.05 else "; within noise"
    tests = f"paired t-test p = {p:.2g}, exact sign-flip p = {exact:.2g}, {len(seeds)} seeds"
    return f"{abs(mean):.4g} {word} ({tests}){verdict}"


class Report:
    """The report in the folder of a comparison, which is written anew after every run that ends.

    Args:
        config: config of the comparison.
        comparison: what is compared.

    Attributes:
        path: the report in Markdown.
    """

    def __init__(self, config: Config, comparison: Comparison) -> None:
        self._config, self._comparison = config, comparison
        self._metric, self._higher_is_better = primary_metric(config)
        self.path = Path(config.output) / "comparison.md"

    def write(self, runs: Sequence[Run]) -> None:
        """Write ``comparison.md``, ``.json`` and ``.html`` and the pictures of the runs that have ended."""
        config, comparison, metric = self._config, self._comparison, self._metric
        folder = self.path.parent
        rows = rows_of(runs)
        save_json(
            folder / "comparison.json",
            {
                "metric": metric,
                "comparison": comparison.model_dump(mode="json"),
                "runs": [_entry(run, metric) for run in runs],
                "provenance": provenance(),
            },
        )
        pictures = pictures_of(rows, metric)
        save_pictures(folder, pictures)
        title, conditions = title_of(config), _conditions(comparison, len(runs))
        said = [*_comparisons(rows, self._higher_is_better), *_failures(rows)]
        heads, cells = cells_of(rows, metric, self._higher_is_better, comparison.referred)
        blocks = [paragraphs([conditions]), grid(heads, cells), paragraphs(said), *map(figure, pictures)]
        save_text(folder / "comparison.html", page_of(f"Comparison: {title}", blocks))
        lines = [
            f"# {Path(config.model.name).name} on {config.data.train}",
            "",
            conditions,
            "",
            table(heads, cells),
            "",
            *(f"- {line}" for line in said),
            "",
            *(f"![{picture.title}]({picture.name}.png)" for picture in pictures),
            "",
        ]
        save_text(self.path, "\n".join(lines))


def _entry(run: Run, metric: str) -> dict[str, Any]:
    """Return what ``comparison.json`` says of a run."""
    swept = run.swept
    entry = {
        "method": str(run.contender),
        "budget": str(run.budget),
        "seed": run.seed,
        "folder": str(run.folder),
        "learning_rate": run.learning_rate,
        "metrics": run.metrics,
        "failure": run.failure,
        "swept": [],
        "sweep_seconds": swept.seconds if swept else 0.0,
    }
    if swept:
        points = [{"learning_rate": rate, metric: score} for rate, score in swept.scores.items()]
        stopped = [{"stopped_step": swept.stopped[rate]} if rate in swept.stopped else {} for rate in swept.scores]
        entry["swept"] = undefined_as_null([point | end for point, end in zip(points, stopped, strict=True)])
    return entry


def _comparisons(rows: Sequence[Row], higher_is_better: bool) -> list[str]:
    """Return a line for each row with a random baseline at its budget, preferably one of the same granularity."""
    said = []
    for row in rows:
        baselines = [one for one in rows if one.budget == row.budget and one.method.partition(":")[0] == BASELINE]
        same = [one for one in baselines if one.granularity == row.granularity]
        if not row.scores or not baselines or row in baselines:
            continue
        baseline = (same or baselines)[0]
        verdict = against(row, baseline, higher_is_better) + "".join(
            f"; {one.method} diverged on {one.num_diverged} seed{'s' * (one.num_diverged > 1)}, the worst outcome"
            for one in (row, baseline)
            if one.num_diverged
        )
        said.append(f"{row.method} against {baseline.method} at {row.budget}: {verdict}.")
    return said


def _failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.method} at {row.budget or 'no budget'} failed ({len(row.failures)} runs): {row.failures[0]}"
        for row in rows
        if row.failures
    ]


def _conditions(comparison: Comparison, num_ended: int) -> str:
    said = f"{len(comparison.seeds)} seed{'s' * (len(comparison.seeds) > 1)}"
    if num_ended < num_runs(comparison):
        said = f"{num_ended} of {num_runs(comparison)} runs so far, {said}"
    if len(comparison.budgets) > 1:
        said += "; the seconds of one budget include measuring, the other budgets reuse its statistics"
    if comparison.learning_rates:
        rates = ", ".join(f"{rate:g}" for rate in comparison.learning_rates)
        part = f"{comparison.tune_fraction:.0%} of the training data held out"
        how = "best in a sweep" if comparison.sweep == "climb" else "best in a sweep by successive halving (ASHA)"
        said += f", each method at the learning rate among {rates} that was {how} on {part}"
    if comparison.perturb:
        said += f", each seed without a random {comparison.perturb:.0%} of the training data"
    if comparison.referred is not None:
        name = comparison.referred
        said += f"; steps to {name}'s score: until an evaluation is as good as {name}'s last with the same seed"
    said += "; search: seconds of all runs that searched the learning rate; total: choose, search and train"
    versions = ", ".join(f"{name} {version}" for name, version in provenance()["versions"].items())
    return f"{said}; scores after the last step. {platform.machine()}, Python {platform.python_version()}, {versions}."

"""The report of a comparison: a table, plots, and a test of each method against a random choice."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison
from adapeft.files.artifact import provenance, save_json, save_text
from adapeft.files.json_numbers import undefined_as_null
from adapeft.subset.empty import NOTHING
from cluster.commands.compare.pictures import pictures_of
from cluster.commands.compare.row import Row, rows_of
from cluster.commands.compare.run import Run
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


def steps_to(row: Row, score: float, higher_is_better: bool) -> float:
    """Return the mean number of steps until an evaluation reached ``score``; NaN if a seed never did."""
    if row.num_diverged:
        return float("nan")
    sign = 1 if higher_is_better else -1
    reached = [
        min((step for step, value in curve.items() if sign * value >= sign * score), default=np.nan)
        for curve in row.curves.values()
    ]
    return float(np.mean(reached)) if reached else float("nan")


def write_report(folder: Path, config: Config, comparison: Comparison, runs: Sequence[Run]) -> Path:
    """Write ``comparison.md``, ``.json`` and ``.html`` and the pictures; return the path of the first."""
    from adapeft.model.load import describe_for
    from adapeft.tasks.registry import TASKS

    metrics = TASKS[config.model.task].metrics(describe_for(config.model, config.data))
    metric, higher_is_better = metrics.primary(config.data.metric)
    rows = rows_of(runs)
    save_json(
        folder / "comparison.json",
        {
            "metric": metric,
            "comparison": comparison.model_dump(mode="json"),
            "runs": [
                {
                    "method": str(run.contender),
                    "budget": str(run.budget),
                    "seed": run.seed,
                    "folder": str(run.folder),
                    "learning_rate": run.learning_rate,
                    "metrics": run.metrics,
                    "failure": run.failure,
                    "swept": undefined_as_null([{"learning_rate": r, metric: v} for r, v in run.swept.items()]),
                }
                for run in runs
            ],
            "provenance": provenance(),
        },
    )
    pictures = pictures_of(rows, metric)
    save_pictures(folder, pictures)
    title, conditions = title_of(config), _conditions(comparison)
    said = [*_comparisons(rows, higher_is_better), *_failures(rows)]
    heads, cells = _cells(rows, metric)
    blocks = [paragraphs([conditions]), grid(heads, cells), paragraphs(said), *map(figure, pictures)]
    save_text(folder / "comparison.html", page_of(f"Comparison: {title}", blocks))
    lines = [
        f"# {Path(config.model.name).name} on {config.data.train}",
        "",
        conditions,
        "",
        table(rows, metric),
        "",
        *(f"- {line}" for line in said),
        "",
        *(f"![{picture.title}]({picture.name}.png)" for picture in pictures),
        "",
    ]
    save_text(folder / "comparison.md", "\n".join(lines))
    return folder / "comparison.md"


def table(rows: Sequence[Row], metric: str) -> str:
    """Return the results as a table in GitHub's Markdown."""
    heads, cells = _cells(rows, metric)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def _cells(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """Return the headings of the results, and their cells."""
    score = f"{metric}, mean ± std"
    heads = [
        *("method", "budget", score, "by seed", "learning rate"),
        *("trained", "delta KiB", "peak MiB", "choose s", "train s"),
    ]
    found = []
    for row in rows:
        if row.scores:
            spread = "" if np.isnan(row.std) else f" ± {row.std:.4f}"
            cells = [
                f"{row.mean:.4f}{spread}{_diverged(row)}",
                ", ".join(f"{score:.3f}" for _, score in sorted(row.scores.items())),
                ", ".join(f"{rate:.3g}" for rate in row.learning_rates),
                f"{row.trained:,.0f}",
                f"{row.delta_bytes / 2**10:,.0f}",
                f"{row.peak_bytes / 2**20:,.0f}",
                f"{row.select_seconds:.0f}",
                f"{row.train_seconds:.0f}",
            ]
        else:
            is_empty = bool(row.failures) and all(NOTHING in failure for failure in row.failures)
            cells = [NOTHING if is_empty else "diverged" if row.num_diverged else "failed", *["–"] * (len(heads) - 3)]
        found.append([row.method, row.budget or "–", *cells])
    return heads, found


def _diverged(row: Row) -> str:
    """Return a note on the seeds that the mean leaves out because their training diverged."""
    total = len(row.scores) + row.num_diverged
    return f", without {row.num_diverged} of {total} seeds, which diverged" if row.num_diverged else ""


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
        lowest = (min if higher_is_better else max)(baseline.scores.values())
        steps = [steps_to(one, lowest, higher_is_better) for one in (row, baseline)]
        mine, theirs = ("never" if np.isnan(count) else f"{count:,.0f} steps" for count in steps)
        said.append(
            f"{row.method} against {baseline.method} at {row.budget}: {verdict}. "
            f"To reach {baseline.method}'s worst score ({lowest:.4g}) on all seeds: {mine}, {baseline.method} {theirs}."
        )
    return said


def _failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.method} at {row.budget or 'no budget'} failed ({len(row.failures)} runs): {row.failures[0]}"
        for row in rows
        if row.failures
    ]


def _conditions(comparison: Comparison) -> str:
    said = f"{len(comparison.seeds)} seed{'s' * (len(comparison.seeds) > 1)}"
    if len(comparison.budgets) > 1:
        said += "; the seconds of one budget include measuring, the other budgets reuse its statistics"
    if comparison.learning_rates:
        rates = ", ".join(f"{rate:g}" for rate in comparison.learning_rates)
        part = f"{comparison.tune_fraction:.0%} of the training data held out"
        said += f", each method at the learning rate among {rates} that was best in a sweep on {part}"
    if comparison.perturb:
        said += f", each seed without a random {comparison.perturb:.0%} of the training data"
    versions = ", ".join(f"{name} {version}" for name, version in provenance()["versions"].items())
    return f"{said}; scores after the last step. {platform.machine()}, Python {platform.python_version()}, {versions}."

"""The report of a comparison: a table, plots, and a test of each method against a random choice."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison
from adapeft.files.artifact import provenance, save, save_json, save_text
from adapeft.methods.registry import get_method
from adapeft.sections.select import Granularity
from adapeft.subset.empty import NOTHING
from cluster.commands.compare.run import Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BASELINE = "random"


@dataclass(frozen=True)
class Row:
    """Results of one method at one budget.

    Attributes:
        method: contender as it is spelled.
        granularity: granularity of its groups.
        budget: budget as it is spelled; empty for a method without a budget.
        scores: seed → score after the last step, in the metric's own units.
        curves: seed → step → score at every evaluation.
        trained: number of parameters trained within the budget, mean over the seeds like the values below.
        delta_bytes: size of the delta.
        peak_bytes: largest memory of a rank during training.
        select_seconds: seconds of measuring and choosing; only choosing if another budget's statistics were reused.
        train_seconds: seconds of training.
        learning_rate: learning rate of training.
        failures: reasons of the failed runs.
        num_diverged: number of failed runs whose training diverged; they have no score, and count as the worst.
    """

    method: str
    granularity: Granularity
    budget: str
    scores: dict[int, float]
    curves: dict[int, dict[int, float]]
    trained: float
    delta_bytes: float
    peak_bytes: float
    select_seconds: float
    train_seconds: float
    learning_rate: float
    failures: tuple[str, ...]
    num_diverged: int = 0

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return float(np.mean(list(self.scores.values()))) if self.scores else float("nan")

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds; NaN for a single seed."""
        return float(np.std(list(self.scores.values()), ddof=1)) if len(self.scores) > 1 else float("nan")


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return one row per method and budget, in the order of the runs."""
    keys = dict.fromkeys((run.contender, run.budget) for run in runs)
    rows = []
    for contender, budget in keys:
        group = [run for run in runs if (run.contender, run.budget) == (contender, budget)]
        done = [run for run in group if run.metrics is not None]

        def mean(*path: str, done: list[Run] = done) -> float:
            return float(np.mean([_at(run.metrics, path) for run in done])) if done else float("nan")

        rows.append(
            Row(
                method=str(contender),
                granularity=contender.granularity,
                budget=str(budget) if get_method(contender.method).is_budgeted else "",
                scores={run.seed: run.scores[run.metrics["metric"]] for run in done if run.metrics and run.scores},
                curves={run.seed: _curve(run.metrics) for run in done if run.metrics},
                trained=mean("trainable_parameters"),
                delta_bytes=mean("delta_bytes"),
                peak_bytes=mean("peak_memory_bytes"),
                select_seconds=mean("seconds", "select"),
                train_seconds=mean("seconds", "train"),
                learning_rate=group[0].learning_rate,
                failures=tuple(run.failure for run in group if run.failure is not None),
                num_diverged=sum(run.has_diverged for run in group),
            )
        )
    return rows


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
    """Write ``comparison.md``, ``comparison.json`` and the plots; return the path of the first."""
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
                }
                for run in runs
            ],
            "provenance": provenance(),
        },
    )
    plots = [plot_scores(folder / "scores.png", rows, metric)]
    if len(comparison.seeds) > 1:
        plots.append(plot_spread(folder / "spread.png", rows, metric))
    lines = [
        f"# {Path(config.model.name).name} on {config.data.train}",
        "",
        _conditions(comparison),
        "",
        table(rows, metric),
        "",
        *_comparisons(rows, higher_is_better),
        *(
            f"- {row.method} at {row.budget or 'no budget'} failed ({len(row.failures)} runs): {row.failures[0]}"
            for row in rows
            if row.failures
        ),
        "",
        *(f"![{path.stem}]({path.name})" for path in plots),
        "",
    ]
    save_text(folder / "comparison.md", "\n".join(lines))
    return folder / "comparison.md"


def table(rows: Sequence[Row], metric: str) -> str:
    """Return the results as a table in GitHub's Markdown."""
    score = f"{metric}, mean ± std"
    heads = [
        *("method", "budget", score, "by seed", "learning rate"),
        *("trained", "delta KiB", "peak MiB", "choose s", "train s"),
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        if row.scores:
            spread = "" if np.isnan(row.std) else f" ± {row.std:.4f}"
            cells = [
                f"{row.mean:.4f}{spread}{_diverged(row)}",
                ", ".join(f"{score:.3f}" for _, score in sorted(row.scores.items())),
                f"{row.learning_rate:g}",
                f"{row.trained:,.0f}",
                f"{row.delta_bytes / 2**10:,.0f}",
                f"{row.peak_bytes / 2**20:,.0f}",
                f"{row.select_seconds:.0f}",
                f"{row.train_seconds:.0f}",
            ]
        else:
            is_empty = bool(row.failures) and all(NOTHING in failure for failure in row.failures)
            cells = [NOTHING if is_empty else "diverged" if row.num_diverged else "failed", *["–"] * (len(heads) - 3)]
        lines.append(f"| {row.method} | {row.budget or '–'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _diverged(row: Row) -> str:
    """Return a note on the seeds that the mean leaves out because their training diverged."""
    total = len(row.scores) + row.num_diverged
    return f", without {row.num_diverged} of {total} seeds, which diverged" if row.num_diverged else ""


def plot_scores(path: Path, rows: Sequence[Row], metric: str) -> Path:
    """Plot scores with standard deviations against trained parameters, as Figure 5 of Fu et al. 2023, upper half."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, line in enumerate(_lines(rows).values()):
        error = [0.0 if np.isnan(row.std) else row.std for row in line]
        x, y = [row.trained for row in line], [row.mean for row in line]
        axes.errorbar(x, y, yerr=error, capsize=3, label=line[-1].method, **_style(index))
    axes.set(xscale="log", xlabel="trained parameters", ylabel=metric)
    return _save(figure, axes, path)


def plot_spread(path: Path, rows: Sequence[Row], metric: str) -> Path:
    """Plot standard deviations over the seeds against trained parameters, as Figure 5, lower half."""
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for index, line in enumerate(_lines(rows).values()):
        x, y = [row.trained for row in line], [row.std for row in line]
        axes.plot(x, y, label=line[-1].method, **_style(index))
    axes.set(xscale="log", xlabel="trained parameters", ylabel=f"standard deviation of {metric}")
    return _save(figure, axes, path)


def _style(index: int) -> dict[str, Any]:
    """Return the style of a line: after matplotlib's ten colours the marker changes, so that methods differ."""
    return {"color": f"C{index % 10}", "marker": "osD^v"[index // 10 % 5], "markersize": 4}


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper", frameon=False)
    save(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)
    return path


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return method → rows with scores, in the order of trained parameters."""
    names = dict.fromkeys(row.method for row in rows if row.scores)
    return {
        name: sorted((row for row in rows if row.method == name and row.scores), key=lambda row: row.trained)
        for name in names
    }


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
            f"- {row.method} against {baseline.method} at {row.budget}: {verdict}. "
            f"To reach {baseline.method}'s worst score ({lowest:.4g}) on all seeds: {mine}, {baseline.method} {theirs}."
        )
    return said


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


def _curve(metrics: dict[str, Any]) -> dict[int, float]:
    return {point["step"]: point[metrics["metric"]] for point in metrics["history"]}


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree

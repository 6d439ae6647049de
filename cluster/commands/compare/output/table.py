"""The table of a comparison: one line per method and budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapeft.config.experiments import Contender
from adapeft.subset.empty import NOTHING
from cluster.commands.compare.output.row import Row


def cells_of(
    rows: Sequence[Row], metric: str, higher_is_better: bool, reference: Contender | None
) -> tuple[list[str], list[list[str]]]:
    """Return the headings of the results, and their cells.

    Args:
        rows: one per method and budget.
        metric: name of the score.
        higher_is_better: whether a higher score is better.
        reference: method whose score the steps of each row are counted to; None: no such column.
    """
    heads = [
        *("method", "budget", f"{metric}, mean ± std", "by seed", "learning rate", "trained", "delta KiB", "peak MiB"),
        *([f"steps to {reference}'s score"] if reference else []),
        *("choose s", "search s", "train s", "total s"),
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
                *([_steps_to(row, _same_budget(row, rows, reference), higher_is_better)] if reference else []),
                *(f"{seconds:.0f}" for seconds in (row.select_seconds, row.search_seconds, row.train_seconds)),
                f"{row.total_seconds:.0f}",
            ]
        else:
            is_empty = bool(row.failures) and all(NOTHING in failure for failure in row.failures)
            cells = [NOTHING if is_empty else "diverged" if row.num_diverged else "failed", *["–"] * (len(heads) - 3)]
        found.append([row.method, row.budget or "–", *cells])
    return heads, found


def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table in GitHub's Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *cells))


def steps_to(row: Row, reference: Row, higher_is_better: bool) -> dict[int, float]:
    """Return seed → steps until an evaluation was as good as the reference's last with this seed; NaN if none was."""
    sign = 1 if higher_is_better else -1
    return {
        seed: min(
            (step for step, score in row.curves[seed].items() if sign * score >= sign * reference.scores[seed]),
            default=np.nan,
        )
        for seed in sorted(row.curves.keys() & reference.scores.keys())
    }


def _steps_to(row: Row, reference: Row | None, higher_is_better: bool) -> str:
    """Return the mean over the seeds, or on how many of them the score was never reached; a divergence never does."""
    steps = list(steps_to(row, reference, higher_is_better).values()) if reference else []
    if not steps:
        return "–"
    never, total = int(np.isnan(steps).sum()) + row.num_diverged, len(steps) + row.num_diverged
    if not never:
        return f"{np.mean(steps):,.0f}"
    return "never" if never == total else f"never on {never} of {total} seeds"


def _same_budget(row: Row, rows: Sequence[Row], reference: Contender) -> Row | None:
    """Return the reference's results at the row's budget, or its only ones if one of the two has no budget."""
    found = [one for one in rows if one.method == str(reference)]
    same = [one for one in found if one.budget == row.budget] or found
    return same[0] if len(same) == 1 else None


def _diverged(row: Row) -> str:
    """Return a note on the seeds that the mean leaves out because their training diverged."""
    total = len(row.scores) + row.num_diverged
    return f", without {row.num_diverged} of {total} seeds, which diverged" if row.num_diverged else ""

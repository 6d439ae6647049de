"""Tables of predicted against measured loss decreases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.terminal.console import Terminal, number_table


def show_validation(result: Mapping[str, Any], terminal: Terminal) -> None:
    """Print rank correlations of predicted and measured loss decreases, one table per learning rate and horizon."""
    for setting in result["settings"]:
        found, fitted = setting["correlations"], setting["at_fitted_reach"]
        title = f"learning rate {setting['learning_rate']:g}, {setting['steps']} steps"
        table = number_table(title, *next(iter(found.values())), "fitted τ")
        table.columns[0].min_width = 36  # longer than any title, so that the tables line up
        for name, values in found.items():
            table.add_row(name, *(_correlation(value) for value in (*values.values(), fitted.get(name))))
        terminal.console.print(table)
        terminal.pairs(
            {
                "reach": f"τ = {setting['planned_constant']:.3g} · Σ learning rates; fitted to the outcomes "
                f"{setting['fitted_constant']:.3g}",
                "overshot": f"{setting['overshooting']:.0%} of the subsets raised the loss instead of lowering it"
                + (f", {diverged:.0%} diverged" if (diverged := setting.get("diverged", 0.0)) else ""),
            }
        )


def _correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"

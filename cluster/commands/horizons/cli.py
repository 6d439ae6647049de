"""The command line of ``adapeft horizons``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def horizons(
    run: Annotated[Path, typer.Argument(help="folder of a run that measured with select.probe_steps")],
    budget: Annotated[str | None, typer.Option(help="budget of the choices, such as 1%; default: the run's")] = None,
) -> None:
    """Show how long a choice stays good during training, from a run that measured along a probe training."""
    from cluster.commands.horizons.horizons import horizons as across
    from cluster.terminal.console import Terminal

    across(run, budget, Terminal())

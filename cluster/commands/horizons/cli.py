"""The command line of ``adapeft horizons``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def horizons(
    run: Annotated[Path, typer.Argument(help="folder of a run that measured with select.probe_steps")],
    budget: Annotated[str | None, typer.Option(help="another than the run's, such as 1%")] = None,
) -> None:
    """Say how long a choice stays good: what each point of the probe chooses, held against the others' best."""
    from cluster.commands.horizons.horizons import horizons as across
    from cluster.terminal.console import Terminal

    across(run, budget, Terminal())

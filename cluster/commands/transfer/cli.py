"""The command line of ``adapeft transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.arguments import Overrides
from cluster.terminal.silence import silence_libraries


def transfer(
    source: Annotated[Path, typer.Option("--from", help="folder of the run that measured")],
    model: Annotated[str, typer.Option("--to", help="model to choose for: folder (its config will do) or hub name")],
    overrides: Overrides = None,
) -> None:
    """Choose for another size of the model from a run's statistics (budget=, groups=tensor, inside=, verify=true)."""
    from adapeft.config.experiments import Transfer
    from adapeft.config.load import parse_section
    from cluster.terminal.console import Terminal

    settings, others = parse_section(Transfer, overrides or [])
    terminal = Terminal()
    with terminal.busy("loading libraries"):
        from cluster.commands.transfer import transfer as transferring

        silence_libraries()
    transferring.run(source, model, settings, others, terminal)

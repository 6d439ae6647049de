"""The command line of ``adapeft transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.arguments import Overrides
from cluster.terminal.silence import silence_libraries


def transfer(
    source: Annotated[Path, typer.Option("--from", help="folder of the run whose statistics are used")],
    model: Annotated[
        str, typer.Option("--to", help="target model: hub name or folder; with groups=tensor its config is enough")
    ],
    overrides: Overrides = None,
) -> None:
    """Choose a subset for another size of a model from a run's statistics (keys: budget, groups, inside, verify)."""
    from adapeft.config.experiments import Transfer
    from adapeft.config.load import parse_section
    from cluster.terminal.console import Terminal

    settings, others = parse_section(Transfer, overrides or [])
    terminal = Terminal()
    with terminal.busy("loading libraries"):
        from cluster.commands.transfer import transfer as transferring

        silence_libraries()
    transferring.run(source, model, settings, others, terminal)

"""The command line of ``adapeft show``."""

from __future__ import annotations

from typing import Annotated

import typer


def show(
    path: Annotated[str, typer.Argument(help="folder or URL of a run, subset (file or name in the store) or delta")],
) -> None:
    """Show the content of a run's folder, a subset or a delta."""
    from cluster.commands.show.show import show as show_path
    from cluster.terminal.console import Terminal

    show_path(path, Terminal())

"""The command line of ``adapeft doctor``."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Show versions, accelerator, compiler, Ray and free memory, and what is missing for which feature."""
    from cluster.commands.doctor.features import features
    from cluster.commands.doctor.machine import machine
    from cluster.commands.doctor.table import feature_table
    from cluster.terminal.console import Terminal
    from cluster.terminal.exit_status import ExitStatus
    from cluster.terminal.silence import silence_libraries

    silence_libraries()
    terminal = Terminal()
    terminal.pairs(machine())
    with terminal.busy("checking features"):
        found = features()
    terminal.console.print(feature_table(found))
    if any(feature.problem and feature.is_required for feature in found):
        raise typer.Exit(ExitStatus.FAILED)

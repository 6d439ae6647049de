"""The command line of ``adapeft compare``."""

from __future__ import annotations

import os
import sys
from functools import partial

from cluster.commands.arguments import ConfigPath, Overrides
from cluster.terminal.exit_status import ExitStatus
from cluster.terminal.silence import silence_libraries


def compare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Compare methods=[…] at budgets=[…] with seeds=[…] in a table and plots; the same command resumes."""
    from adapeft.config.experiments import load_comparison
    from cluster.terminal.console import Terminal

    (comparison, loaded), terminal = load_comparison(config, overrides or []), Terminal()
    with terminal.busy("loading libraries"):
        from cluster.commands.compare.compare import check, compare, finished
        from cluster.commands.compare.machines.opening import machines_of
        from cluster.commands.compare.output.report import Report
        from cluster.inspection.inspect import inspect

        silence_libraries()
    with terminal.checking() as report:
        check(loaded, comparison, partial(inspect, report=report))
    written = Report(loaded, comparison)
    try:
        with machines_of(loaded, comparison) as machines:
            runs = compare(loaded, comparison, terminal.note, machines, written.write)
    except KeyboardInterrupt:
        terminal.note(f"stopped; the same command resumes from {written.path.parent}/")
        sys.stdout.flush()
        os._exit(ExitStatus.INTERRUPTED)  # a cleaner exit would wait for the threads; runs end with this process
    terminal.show_markdown(written.path.read_text(encoding="utf-8"))
    terminal.note(f"table and plots: {written.path.parent}/")
    if not finished(runs):
        sys.exit(ExitStatus.FAILED)

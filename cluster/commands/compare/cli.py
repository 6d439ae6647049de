"""The command line of ``adapeft compare``."""

from __future__ import annotations

import sys
from pathlib import Path

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
        from cluster.commands.compare.report import write_report
        from cluster.inspection.inspect import inspect

        silence_libraries()
    with terminal.busy("checking config, data and model"):
        check(loaded, comparison, inspect)
    runs = compare(loaded, comparison, terminal.note)
    report = write_report(Path(loaded.output), loaded, comparison, runs)
    terminal.show_markdown(report.read_text(encoding="utf-8"))
    terminal.note(f"table and plots: {report.parent}/")
    if not finished(runs):
        sys.exit(ExitStatus.FAILED)

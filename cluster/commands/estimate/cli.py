"""The command line of ``adapeft estimate``."""

from __future__ import annotations

from cluster.commands.arguments import ConfigPath, Overrides
from cluster.terminal.silence import silence_libraries


def estimate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Estimate the memory of measuring and training per device, by part, ZeRO stage and number of workers."""
    from adapeft.config.load import load_config
    from cluster.terminal.console import Terminal

    loaded, terminal = load_config(config, overrides or []), Terminal()
    with terminal.busy("loading libraries"):
        from cluster.commands.estimate.estimate import show_estimate
        from cluster.inspection.estimate import estimate_of, remarks
        from cluster.inspection.inspect import inspect
        from cluster.zero.settings import zero_of

        silence_libraries()
    with terminal.checking() as report:
        inspection = inspect(loaded, report)
    with terminal.busy("running the model without its weights"):
        zero, found = zero_of(loaded.cluster), estimate_of(inspection)
        loads, grid, lines = found.loads(zero), found.grid(zero), remarks(found, zero)
    show_estimate(loads, zero, grid, terminal)
    if inspection.auto:
        terminal.note(f"select.groups = auto: {inspection.auto}")
    for line in lines:
        terminal.note(line)
    if loaded.cluster.workers > zero.workers:
        terminal.note(f"estimated for {zero.workers} workers (cluster.min_workers), with which each holds the most")

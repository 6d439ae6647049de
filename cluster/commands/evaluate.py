"""``adapeft evaluate``: scores of the base model with or without a delta."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapeft.errors import AdapeftError
from cluster.commands.arguments import ConfigPath, Overrides
from cluster.run.opening import opened


def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    delta: Annotated[Path | None, typer.Option(help="delta to apply; default: the run's own")] = None,
    base: Annotated[bool, typer.Option("--base", help="evaluate the base model without a delta")] = False,
) -> None:
    """Evaluate the base model with a delta, or alone, on the evaluation data."""
    if base and delta is not None:
        raise AdapeftError(f"--base: evaluates without a delta, but --delta {delta} gives one. Leave one of them out.")
    with opened(config, overrides, claims=False) as session:
        from cluster.run import pipeline

        chosen = delta or session.folder.delta
        if not base and not chosen.is_file():
            raise AdapeftError(f"{chosen}: no such delta. Run `adapeft train` first, or give --delta PATH or --base.")
        pipeline.evaluate(session, delta and delta.resolve(), base=base)

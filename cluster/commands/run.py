"""``adapeft run``: the whole flow."""

from __future__ import annotations

from cluster.commands.arguments import ConfigPath, Overrides
from cluster.run.opening import opened


def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure, choose, train, evaluate; takes up again what the same run has finished."""
    with opened(config, overrides) as session:
        from cluster.run import pipeline

        pipeline.run(session)

"""``adapeft run``: all stages of a run."""

from __future__ import annotations

from cluster.commands.arguments import ConfigPath, Overrides
from cluster.run.opening import opened


def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure, choose, train and evaluate; the same command resumes an interrupted run."""
    with opened(config, overrides) as session:
        from cluster.run import pipeline

        pipeline.run(session)

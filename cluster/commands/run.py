"""``adapeft run``: all stages of a run."""

from __future__ import annotations

from cluster.commands.arguments import ConfigPath, Overrides
from cluster.run.opening import opened


def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the parameters, choose a subset within the budget, train and evaluate it; the same command resumes."""
    with opened(config, overrides) as session:
        from cluster.run import pipeline

        pipeline.run(session)

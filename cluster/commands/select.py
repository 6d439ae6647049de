"""``adapeft select``: measure and choose."""

from __future__ import annotations

from cluster.commands.arguments import ConfigPath, Overrides
from cluster.run.opening import opened


def select(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure and choose, and find train.learning_rate: auto; with select.statistics=RUN nothing is measured anew."""
    with opened(config, overrides) as session:
        from cluster.run import pipeline

        if not session.folder.subset.is_file():
            session.check_memory(trains=session.config.train.learning_rate == "auto")
        pipeline.select(session)

"""``adapeft train``: train a chosen subset."""

from __future__ import annotations

from adapeft.errors import AdapeftError
from cluster.commands.arguments import ConfigPath, Overrides
from cluster.run.opening import opened


def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the subset in the run's folder, or the one that train.subset names."""
    with opened(config, overrides) as session:
        from cluster.run import pipeline

        if not session.folder.subset.is_file() and session.config.train.subset is None:
            raise AdapeftError(
                f"output = {session.folder.path} has no subset.safetensors. Run `adapeft select` first, or give a "
                f"subset: train.subset=PATH, URL or NAME."
            )
        pipeline.run(session)

"""``adapeft validate``: test how well each estimator predicts."""

from __future__ import annotations

from cluster.commands.arguments import ConfigPath, Overrides
from cluster.run.opening import opened


def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train random subsets briefly and show how well each estimator predicts their gain (keys: subsets, steps, …)."""
    from adapeft.config.experiments import Trials
    from adapeft.config.load import load_config, parse_section

    trials, others = parse_section(Trials, overrides or [])
    trials.check(load_config(config, others))  # before anything is written
    with opened(config, others) as session:
        from cluster.run import pipeline

        pipeline.validate(session, trials)

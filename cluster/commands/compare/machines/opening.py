"""Choice of the machines that execute the runs of a comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison
from adapeft.errors import AdapeftError
from cluster.commands.compare.machines.local import Machines


def is_on_ray(config: Config, comparison: Comparison) -> bool:
    """Whether the runs are executed by Ray: with its launcher, at an address, or because the sweep needs it.

    Raises:
        AdapeftError: ``sweep = asha`` with the local launcher, or Ray is not installed.
    """
    needs_ray = comparison.sweep == "asha"
    launcher = config.cluster.launched_by(os.environ.get("RAY_ADDRESS"))
    if needs_ray and config.cluster.launcher == "local":
        raise AdapeftError(
            "sweep = asha: is done by Ray Tune, but cluster.launcher = local starts everything without Ray. Set "
            "cluster.launcher: auto or ray, or sweep: climb."
        )
    if launcher == "local" and not needs_ray:
        return False
    try:
        import_module("ray.tune" if needs_ray else "ray")
    except ImportError as error:
        key = "sweep = asha" if needs_ray else f"cluster.launcher = {config.cluster.launcher}"
        raise AdapeftError(
            f"{key}: needs Ray with Tune, which is not installed ({error}). Run `pip install 'adapeft[cluster]'`, or "
            "set cluster.launcher: local and sweep: climb."
        ) from error
    return True


@contextmanager
def machines_of(config: Config, comparison: Comparison) -> Iterator[Machines]:
    """Yield the machines of a comparison.

    Raises:
        AdapeftError: no cluster answers, or it has too few resources for one run.
    """
    if not is_on_ray(config, comparison):
        yield Machines(comparison.parallel or 1)
        return
    from cluster.commands.compare.machines.on_ray import ray_machines

    with ray_machines(config, comparison.parallel) as machines:
        yield machines

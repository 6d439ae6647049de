"""A run's folder on machines that do not see the one of the process that launched the run."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from adapeft.config.config import Config
from adapeft.errors import AdapeftError
from adapeft.sections.paths import is_url
from cluster.failure import WorkerError
from cluster.output.folder import RunFolder
from cluster.output.mirror import Mirror

Look = Callable[[], None]
"""Puts what is new where the output is, if it is time to."""


@contextmanager
def run_copy(config: Config, mark: str, machine: str, *, puts: bool) -> Iterator[Look]:
    """Gives this rank its machine's folder of the run, and the first rank what it calls while it works. Collective.

    A machine that sees the launching process's folder works in it. Any other has a copy, where the output is a URL: its
    first rank takes what is there, and puts what is new in the end. What ranks write together is on the first rank's
    machine (see ``adapeft.files.rank_files``), so that no two machines put the same file.

    Args:
        config: of the run.
        mark: name of a file that the launching process has in the folder's logs.
        machine: tells this machine from the other ranks'.
        puts: whether the command makes anything that the output is to hold.

    Raises:
        AdapeftError: the folder is not seen here, and there is no URL to have it from; or the URL cannot be read.
        WorkerError: the storage fails.
    """
    here = RunFolder.of(config).logs / mark
    if not is_url(config.output):
        if not here.exists():
            raise AdapeftError(
                f"output = {config.output}: the folder on the machine that launched the run is not seen on "
                f"{socket.gethostname()}. Give one on storage that all machines share, or a URL (s3://…)."
            )
        yield _nothing
        return
    mirror = _taken(config, here, machine)
    try:
        if mirror is None or not puts:
            yield _nothing
        else:
            with _putting(mirror):
                yield mirror.look
    finally:
        if mirror is not None:
            here.unlink(missing_ok=True)


@contextmanager
def _putting(mirror: Mirror) -> Iterator[None]:
    """Puts what is new when the block ends; where that was an error, if the storage lets it."""
    try:
        yield
    except BaseException:
        if not mirror.has_failed:
            with suppress(AdapeftError, WorkerError):  # the first cause is told
                mirror.put()
        raise
    mirror.put()


def _taken(config: Config, mark: Path, machine: str) -> Mirror | None:
    """What keeps this machine's copy, on the rank that does; returns once every machine has its copy."""
    from cluster.zero.engine import join

    ranks = join()
    is_first_here = ranks.all_gather_object(machine).index(machine) == ranks.rank
    mirror = None
    # The first rank's machine first: others may see its copy, and need none of their own.
    for turn in (ranks.rank == 0, is_first_here):
        if turn and not mark.exists():
            mirror = Mirror(config.output)
            mirror.fetch(over=True)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        ranks.all_reduce(torch.zeros(1))
    return mirror


def _nothing() -> None:
    """There is no copy to keep."""

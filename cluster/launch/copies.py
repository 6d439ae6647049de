"""The run folder on machines that do not share the launching process's file system."""

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
"""Callback that uploads new files to the output URL if the upload interval has passed."""


@contextmanager
def run_copy(config: Config, mark: str, machine: str, *, puts: bool) -> Iterator[Look]:
    """Prepare the run folder on this rank's machine and yield a callback that uploads new files. Collective.

    A machine that shares the launching process's folder works in it. If the output is a URL, any other machine works in
    a copy: its first rank downloads the files at the start and uploads new ones at the end. Files that ranks write
    together are on the first rank's machine (see ``adapeft.files.rank_files``), so no two machines upload the same
    file.

    Args:
        config: config of the run.
        mark: name of a file that the launching process created in the folder's logs.
        machine: unique identifier of this machine among those of the ranks.
        puts: whether to upload new files to the output URL.

    Raises:
        AdapeftError: the folder is not visible on this machine and ``output`` is no URL, or the URL cannot be read.
        WorkerError: the storage fails.
    """
    here = RunFolder.of(config).logs / mark
    if not is_url(config.output):
        if not here.exists():
            raise AdapeftError(
                f"output = {config.output}: this folder of the machine that launched the run is not visible on "
                f"{socket.gethostname()}. Set output to a folder on storage that all machines share, or to a URL "
                f"(s3://…)."
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
    """Upload new files when the block ends; after an exception, ignore errors of the upload."""
    try:
        yield
    except BaseException:
        if not mirror.has_failed:
            with suppress(AdapeftError, WorkerError):  # report the first cause
                mirror.put()
        raise
    mirror.put()


def _taken(config: Config, mark: Path, machine: str) -> Mirror | None:
    """Return the mirror of this machine's copy on the rank that keeps it, once every machine has its copy."""
    from cluster.zero.engine import join

    ranks = join()
    is_first_here = ranks.all_gather_object(machine).index(machine) == ranks.rank
    mirror = None
    # The first rank's machine goes first: others may share its file system and need no copy.
    for turn in (ranks.rank == 0, is_first_here):
        if turn and not mark.exists():
            mirror = Mirror(config.output)
            mirror.fetch(over=True)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        ranks.all_reduce(torch.zeros(1))
    return mirror


def _nothing() -> None:
    """Do nothing: there is no copy to upload."""

"""What a Ray task of a comparison does. Imports neither torch nor Ray, as its process only waits for another one."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from cluster.commands.compare.machines.process import Process


def command_on_machine(command: str, settings: str, log: str, environment: Mapping[str, str]) -> int:
    """Execute a command with a config file on this machine and return its exit status.

    Args:
        command: ``run``, ``select``, ….
        settings: config file.
        log: file that gets all output.
        environment: environment variables in addition to those of this process.

    Raises:
        FileNotFoundError: the file is not visible on this machine.
    """
    check_is_visible(settings)
    return Process(command, settings, log=Path(log), environment={**os.environ, **environment}).wait()


def check_is_visible(settings: str) -> None:
    """Check that the folder of a comparison is on storage that this machine shares.

    Raises:
        FileNotFoundError: it is not.
    """
    if not Path(settings).is_file():
        raise FileNotFoundError(
            f"output: {settings} is not visible on {socket.gethostname()}. Set output to a folder on storage that all "
            "machines share."
        )

"""An adapeft command in a process of its own. Imports only the standard library, for Ray's workers that wait for it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_GRACE_SECONDS = 30.0
"""Time that an interrupted command has to end by itself."""


class Process:
    """An adapeft command with all output to a log file; it ends with the process that has started it.

    Args:
        arguments: the command and its arguments.
        log: file that gets the output.
        environment: environment variables; None: those of this process.
    """

    def __init__(self, *arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "cluster.commands.compare.machines.child", *arguments]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment
            )

    def status(self) -> int | None:
        """Return the exit status; None while the command runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Return the exit status once the command has ended; stop it if this is interrupted."""
        try:
            return self._process.wait()
        finally:
            self.stop()

    def stop(self) -> None:
        """Interrupt the command, which another one can resume; does nothing if it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

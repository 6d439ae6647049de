"""Start and end of a command that works on a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.launch.opening import prepare
from cluster.terminal.exit_status import ExitStatus
from cluster.terminal.silence import silence_libraries

if TYPE_CHECKING:
    from cluster.run.session import Session
    from cluster.terminal.console import Terminal


@contextmanager
def opened(
    config: Path, overrides: list[str] | None, *, claims: bool = True, terminal: Terminal | None = None
) -> Iterator[Session]:
    """Validate a run's config and yield its session; an interrupt ends this process.

    Args:
        config: YAML file.
        overrides: ``key=value`` arguments.
        claims: whether the command writes into the run's folder.
        terminal: where to show the progress; None for standard output.
    """
    from adapeft.config.load import load_config
    from cluster.terminal.console import Terminal, short

    loaded, terminal = load_config(config, overrides or []), terminal or Terminal()
    with terminal.busy("loading libraries"):
        prepare(loaded.cluster)
        from cluster.run.session import Session

        silence_libraries()
    with Session(loaded, terminal, claims=claims) as session:
        try:
            yield session
        except KeyboardInterrupt:
            session.interrupted()
            if claims:
                terminal.note(f"stopped; the same command resumes from {short(session.folder.path)}")
            # A thread is waiting inside Ray, where a cleaner exit crashes. A local Ray ends with this process.
            sys.stdout.flush()
            os._exit(ExitStatus.INTERRUPTED)

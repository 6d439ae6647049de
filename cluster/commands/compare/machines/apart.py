"""A run in another process, unless an earlier comparison has finished it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from adapeft.config.config import Config
from adapeft.config.write import to_yaml
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_text
from cluster.commands.compare.run import REFUSED, Outcome
from cluster.output.contents import KnownContents
from cluster.output.folder import RunFolder
from cluster.output.metrics import load_metrics

Contents = Callable[[Config], Mapping[str, str]]


def run_apart(config: Config, execute: Callable[[Path, Path], int], contents: Contents | None = None) -> Outcome:
    """Execute a run in another process unless an earlier call has finished it; return metrics or reason of failure.

    Args:
        config: config of the run.
        execute: function that runs a config file in a separate process with all output to a log file, and returns the
            exit status.
        contents: function that returns the hashes of a run's inputs, to recognize a finished run; None hashes them
            anew.
    """
    outcome = finished(config, contents)
    if outcome is not None:
        return outcome
    settings, log = written(config)
    return outcome_of(config, execute(settings, log), log)


def finished(config: Config, contents: Contents | None = None) -> Outcome | None:
    """Return the outcome of a run that an earlier call has finished, or whose folder holds another run; else None."""
    folder = RunFolder(Path(config.output))
    try:
        if "after" in (content := load_metrics(folder.metrics)):
            folder.check_is_of(config, (contents or KnownContents())(config))
            return content, None
    except AdapeftError as error:
        return None, f"{REFUSED}{error}"
    return None


def written(config: Config) -> tuple[Path, Path]:
    """Write the config next to the run's folder; return its path and that of the log."""
    place = Path(config.output)
    place.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix: a learning rate in the name contains a point.
    settings, log = (place.with_name(f"{place.name}.{suffix}") for suffix in ("yaml", "log"))
    save_text(settings, to_yaml(config))
    return settings, log


def outcome_of(config: Config, status: int, log: Path) -> Outcome:
    """Return the outcome of a run whose process has ended with ``status``."""
    if status == 0:
        return load_metrics(RunFolder(Path(config.output)).metrics), None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    # A command prints its message last, and the message may have several lines.
    starts = [number for number, line in enumerate(lines) if line.startswith((REFUSED, "failed "))]
    message = lines[starts[-1] :] if starts else [f"it exited with status {status}:", *(lines or ["no output"])[-1:]]
    return None, f"{' '.join(map(str.strip, message))} (full log: {log})"

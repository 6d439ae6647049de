"""Identity of a run in metrics, logs and a cluster's list of jobs."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata

from adapeft.config.config import Config
from adapeft.config.keys import comparable


def run_id(config: Config) -> str:
    """Return ``mine-3fb1a8c0`` for output ``runs/mine``: the same for the same config, whichever job runs it.

    It is that of the config as the user gives it: what is found during a run, as a learning rate, would change it.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", config.output.rstrip("/").rpartition("/")[2].lower()).strip("-")
    digest = hashlib.sha256(json.dumps(comparable(config)).encode()).hexdigest()[:8]
    return f"{slug[:40] or 'run'}-{digest}"


def job_metadata(config: Config, run: str) -> dict[str, str]:
    """Return the description of a run in a list of jobs.

    Args:
        config: config of the run.
        run: its identity.
    """
    return {
        "adapeft": metadata.version("adapeft"),
        "run": run,
        "output": config.output,
        "model": config.model.name,
        "method": config.select.method,
        "budget": str(config.select.budget),
    }

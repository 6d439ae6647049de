"""What every results file says of its making."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """What it ran on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("adapeft", "torch", "transformers", "deepspeed", "ray"))
    return f"{platform.machine()}, Python {platform.python_version()}, {packages}."

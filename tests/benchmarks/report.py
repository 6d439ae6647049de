"""Contents common to all results files."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Return a sentence on the platform and the versions of libraries."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("adapeft", "torch", "transformers", "deepspeed", "ray"))
    return f"{platform.machine()}, Python {platform.python_version()}, {packages}."

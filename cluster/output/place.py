"""Where a run's output is: a folder, or a URL and the folder in which its files are worked on."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from adapeft.errors import AdapeftError
from adapeft.sections.paths import is_url

RECORD = ".mirror.json"
"""In a working folder, of what the storage had when the two were the same."""


def check_is_folder(place: str, command: str) -> None:
    """Refuses a URL where a command writes more than one run.

    Raises:
        AdapeftError: it is one.
    """
    if is_url(place):
        raise AdapeftError(f"output = {place}: `adapeft {command}` writes to a folder alone. Give output=FOLDER.")


def working_folder(place: str) -> Path:
    """``place`` itself, or for a URL the folder in the user's cache where its files are worked on."""
    if not is_url(place):
        return Path(place)
    url = place.rstrip("/")
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", url.rpartition("/")[2])[:40]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "adapeft" / "runs" / f"{slug}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"

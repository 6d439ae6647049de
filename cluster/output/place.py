"""Place of a run's output: a folder, or a URL with a local working folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from adapeft.errors import AdapeftError
from adapeft.sections.paths import is_url

RECORD = ".mirror.json"
"""File of a working folder that records the state of the storage at the last sync."""


def check_is_folder(place: str, command: str) -> None:
    """Check that ``place`` is no URL, for commands that write more than one run.

    Raises:
        AdapeftError: it is a URL.
    """
    if is_url(place):
        raise AdapeftError(f"output = {place}: `adapeft {command}` writes only to a folder. Give output=FOLDER.")


def working_folder(place: str) -> Path:
    """Return ``place`` itself, or for a URL its working folder in the user's cache."""
    if not is_url(place):
        return Path(place)
    url = place.rstrip("/")
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", url.rpartition("/")[2])[:40]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "adapeft" / "runs" / f"{slug}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"

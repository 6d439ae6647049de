"""From what a person writes for a subset to its file: a path, a URL, or a name in the store."""

from __future__ import annotations

from pathlib import Path

from adapeft.sections.paths import is_name, is_url
from adapeft.subset.store import SubsetStore, download


def locate(place: str | Path) -> Path:
    """The file on this machine that ``place`` stands for.

    A file that is there wins; what has a slash or ends in ``.safetensors`` is a path, whether it is there or not; what
    has ``://`` is a URL, as fsspec takes it; anything else is a name in the store that ``$ADAPEFT_STORE`` names. A
    ``Path`` is a path.

    Raises:
        AdapeftError: no such name, a damaged entry, or a URL that cannot be read.
    """
    if isinstance(place, Path):
        return place
    if is_url(place):
        return download(place)
    if not is_name(place):
        return Path(place).expanduser()
    store = SubsetStore()
    return store.fetch(store.get(place))

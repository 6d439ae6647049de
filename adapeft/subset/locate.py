"""Resolution of a subset's path, URL or name in the store to a file."""

from __future__ import annotations

from pathlib import Path

from adapeft.sections.paths import is_name, is_url
from adapeft.subset.store import SubsetStore, download


def locate(place: str | Path) -> Path:
    """Return the local file of ``place``, which is downloaded if necessary.

    A ``Path``, the name of an existing file, and any string with a slash or the suffix ``.safetensors`` is a path. A
    string with ``://`` is a URL for fsspec. Any other string is a name in the store at ``$ADAPEFT_STORE``.

    Raises:
        AdapeftError: there is no such name, its entry is damaged, or a URL cannot be read.
    """
    if isinstance(place, Path):
        return place
    if is_url(place):
        return download(place)
    if not is_name(place):
        return Path(place).expanduser()
    store = SubsetStore()
    return store.fetch(store.get(place))

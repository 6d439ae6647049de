"""The cache of this machine for tokenized splits, with its progress as events."""

from __future__ import annotations

from adapeft.data.cache import Cache
from cluster.events import Report


def cache_of(field: str, report: Report) -> Cache:
    """Return the cache, which reports the rows of the split ``field`` that are tokenized."""
    return Cache(lambda done, total: report({"step": f"tokenizing {field}", "done": done, "total": total}))

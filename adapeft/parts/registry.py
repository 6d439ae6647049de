"""The registry of part kinds. A new kind is a file here and an entry in ``KINDS``; its export goes into ``formats``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.parts.adapter import Adapter
from adapeft.parts.dense import Dense
from adapeft.parts.elements import Elements
from adapeft.parts.gaps import STORED, unpacked
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part, PartHeader
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole

# In the order in which their layers are prepared: an adapter goes after a layer that LoRA has wrapped.
KINDS: dict[str, type[Part]] = {cls.kind: cls for cls in (Whole, Rows, Elements, Dense, Lora, Adapter)}


def by_kind(parts: Mapping[str, Part]) -> list[tuple[type[Part], dict[str, Part]]]:
    """Return the kinds that occur, in the order of ``KINDS``, with the parts of each."""
    found: list[tuple[type[Part], dict[str, Part]]] = []
    for cls in KINDS.values():
        if own := {name: part for name, part in parts.items() if type(part) is cls}:
            found.append((cls, own))
    return found


def load_part(path: str | Path, name: str, entry: Mapping[str, Any], indices: Tensor | None) -> Part:
    """Return the part that a file describes; to be called within ``reading``.

    Raises:
        AdapeftError: kind, indices, shape or rank are invalid or contradict each other.
    """
    if indices is not None and indices.dtype not in STORED:
        known = ", ".join(map(str, STORED))
        raise AdapeftError(f"{path}: the indices of {name!r} have dtype {indices.dtype}, not one of {known}.")
    header = PartHeader.model_validate(entry)
    cls = KINDS.get(header.kind)
    if cls is None or cls.is_indexed != (indices is not None):
        raise AdapeftError(f"{path}: {name!r} has kind {header.kind!r}, which does not match its indices.")
    part = cls.read(header, None if indices is None else unpacked(indices))
    part.check(path, name)
    return part

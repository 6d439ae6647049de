"""Export of a subset as ``unfrozen_parameters`` of axolotl: one pattern per tensor or range of consecutive rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import singledispatch
from pathlib import Path

import yaml
from torch import Tensor

from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_text
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset

_ABOUT_RANGES = (
    "# axolotl zeroes the gradients of all other rows, but weight decay still changes them: set weight_decay: 0.\n"
)


def unfrozen_parameters(trained: Subset | Delta) -> list[str]:
    """Return patterns that match exactly the parameters that ``trained`` trains.

    axolotl matches a pattern from the start of a name and takes its dots literally. A range behind it selects indices
    of the first dimension; several ranges of one parameter are combined.

    Raises:
        AdapeftError: a part cannot be written as a pattern. Names the parameter.
    """
    if isinstance(trained, Subset):
        parts, whole = dict(trained.parts), trained.always_train
    else:
        parts, whole = {name: change.part for name, change in trained.changes.items()}, tuple(trained.new)
    return [f"^{name}${span}" for name, spans in _spans(parts, whole) for span in spans]


def save_unfrozen_parameters(trained: Subset | Delta, out: str | Path) -> Path:
    """Write YAML with the key ``unfrozen_parameters``, to be pasted into a config.

    Raises:
        AdapeftError: a part cannot be written as a pattern, or ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise AdapeftError(f"--out {out}: already exists. Give a new file.")
    patterns = unfrozen_parameters(trained)
    if not patterns:
        raise AdapeftError("nothing is trained, and axolotl would train everything for an empty list.")
    comment = _ABOUT_RANGES if any(pattern.endswith("]") for pattern in patterns) else ""
    save_text(out, comment + yaml.safe_dump({"unfrozen_parameters": patterns}, width=1000))
    return out


def _spans(parts: Mapping[str, Part], whole: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    odd = [name for name in (*parts, *whole) if re.fullmatch(r"[\w.]+", name) is None]
    if odd:
        raise AdapeftError(f"{odd[0]!r} has special characters of patterns in its name: axolotl cannot match it.")
    yield from ((name, _spans_of(part, name)) for name, part in parts.items())
    yield from ((name, [""]) for name in whole)


@singledispatch
def _spans_of(part: Part, name: str) -> list[str]:
    """Return ranges of one parameter along its first dimension, ``""`` for all of it; one function per kind of part.

    Raises:
        AdapeftError: the part has no such ranges.
    """
    raise _no_spans(part.kind, name)


@_spans_of.register
def _(part: Whole, name: str) -> list[str]:
    return [""]


@_spans_of.register
def _(part: Rows, name: str) -> list[str]:
    if part.dim:
        raise _no_spans(f"{part.kind} along dimension {part.dim}", name)
    return _runs(part.indices)


@_spans_of.register
def _(part: Elements, name: str) -> list[str]:
    if len(part.shape) > 1:
        raise _no_spans(part.kind, name)
    return _runs(part.indices)


def _no_spans(what: str, name: str) -> AdapeftError:
    return AdapeftError(
        f"{name!r} is trained as {what}: unfrozen_parameters supports only whole tensors and rows along the first "
        f"dimension. Choose with select.groups=tensor, or train with adapeft."
    )


def _runs(indices: Tensor) -> list[str]:
    """Return ``[first:last + 1]`` for every run of consecutive numbers in ascending ``indices``."""
    breaks = (indices.diff() != 1).nonzero().squeeze(1) + 1
    return [f"[{int(run[0])}:{int(run[-1]) + 1}]" for run in indices.tensor_split(breaks) if len(run)]

"""A subset as the ``unfrozen_parameters`` of an axolotl config: a pattern a tensor, a range a run of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from torch import Tensor

from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_text
from adapeft.parts.part import Part
from adapeft.subset.subset import Subset

_ABOUT_RANGES = (
    "# axolotl zeroes the gradients of all other rows, and weight decay moves them all the same: set weight_decay: 0.\n"
)


def unfrozen_parameters(trained: Subset | Delta) -> list[str]:
    """Patterns that match what ``trained`` trains and nothing else.

    axolotl matches a pattern from a name's start, takes its dots literally, and a range behind it for indices along
    the first dimension; several ranges of one parameter add up.

    Raises:
        AdapeftError: a part that no pattern can say; names the parameter.
    """
    if isinstance(trained, Subset):
        parts, whole = dict(trained.parts), trained.always_train
    else:
        parts, whole = {name: change.part for name, change in trained.changes.items()}, tuple(trained.new)
    return [f"^{name}${span}" for name, spans in _spans(parts, whole) for span in spans]


def save_unfrozen_parameters(trained: Subset | Delta, out: str | Path) -> Path:
    """Writes the YAML of one key, to be pasted into a config.

    Raises:
        AdapeftError: a part that no pattern can say, or ``out`` is there already.
    """
    out = Path(out)
    if out.exists():
        raise AdapeftError(f"--out {out}: there already. Give a new file.")
    patterns = unfrozen_parameters(trained)
    if not patterns:
        raise AdapeftError("nothing is trained, and of an empty list axolotl makes that everything is.")
    comment = _ABOUT_RANGES if any(pattern.endswith("]") for pattern in patterns) else ""
    save_text(out, comment + yaml.safe_dump({"unfrozen_parameters": patterns}, width=1000))
    return out


def _spans(parts: Mapping[str, Part], whole: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    odd = [name for name in (*parts, *whole) if re.fullmatch(r"[\w.]+", name) is None]
    if odd:
        raise AdapeftError(f"{odd[0]!r} has signs in it that mean something in a pattern: axolotl cannot name it.")
    for name, part in parts.items():
        if part.kind == "tensor":
            yield name, [""]
        elif part.indices is not None and part.dim == 0 and (part.kind == "rows" or len(part.shape) == 1):
            yield name, [f"[{start}:{end}]" for start, end in _runs(part.indices)]
        else:
            along = f" along dimension {part.dim}" if part.kind == "rows" else ""
            raise AdapeftError(
                f"{name!r} is trained as {part.kind}{along}: unfrozen_parameters holds whole tensors and rows along "
                f"the first dimension alone. Choose with select.groups=tensor, or train here."
            )
    yield from ((name, [""]) for name in whole)


def _runs(indices: Tensor) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of every run of neighbours in ascending ``indices``."""
    breaks = (indices.diff() != 1).nonzero().squeeze(1) + 1
    yield from ((int(run[0]), int(run[-1]) + 1) for run in indices.tensor_split(breaks) if len(run))

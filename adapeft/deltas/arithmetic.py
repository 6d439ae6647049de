"""Arithmetic of deltas of one base: scaling, sums, differences and weighted means.

Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023. Sums are computed in float64 and rounded once; a sum
of LoRA stays LoRA as long as that is smaller than the matrix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapeft.deltas.delta import Delta
from adapeft.deltas.entries import Entries, smallest_change, weighted_sum
from adapeft.errors import AdapeftError
from adapeft.parts.change import Change


def scaled(delta: Delta, factor: float) -> Delta:
    """Return the delta with its differences times ``factor``; new parameters are not differences and stay unchanged.

    Raises:
        AdapeftError: ``factor`` is not finite.
    """
    return sum_of({"delta": delta}, [factor])


def difference(a: Delta, b: Delta, heads: str | None = None) -> Delta:
    """Return a − b; ``heads`` is ``"a"`` or ``"b"`` if both have new parameters.

    Raises:
        AdapeftError: as ``sum_of``.
    """
    return sum_of({"a": a, "b": b}, [1.0, -1.0], heads)


def sum_of(deltas: Mapping[str, Delta], weights: Sequence[float], heads: str | None = None) -> Delta:
    """Return Σ weight · delta.

    Args:
        deltas: deltas of one base; their names appear in messages and in the description.
        weights: one weight per delta, in order; a delta of weight 0 adds nothing.
        heads: name of the delta whose new parameters (a head) and buffers the sum keeps; optional if only one delta has
            any, or all of these are equal.

    Raises:
        AdapeftError: the bases differ, weights are too few, too many or not finite, two adapters are behind the same
            layer, or several heads differ.
    """
    _check(deltas, weights, heads)
    owners = [name for name, delta in deltas.items() if _whole(delta)]
    if heads is None and owners:
        heads = owners[0]
        for other in owners[1:]:
            if not _same(_whole(deltas[heads]), _whole(deltas[other])):
                raise AdapeftError(
                    f"{heads!r} and {other!r} each have their own {next(iter(_whole(deltas[heads])))!r}: new "
                    f"parameters and buffers are not differences to a base and cannot be added. Choose which to keep: "
                    f"heads={heads!r}."
                )
    return _combined("sum", deltas, weights, _whole(deltas[heads]) if heads else {}, heads)


def interpolation(deltas: Mapping[str, Delta], weights: Sequence[float], heads: str | None = None) -> Delta:
    """Return the weighted mean of deltas, of their new parameters and of their buffers.

    Args:
        deltas: deltas of one base; their names appear in messages and in the description.
        weights: one weight per delta, in order; they add up to 1.
        heads: name of the delta whose new parameters (a head) and buffers the result keeps, instead of their mean.

    Raises:
        AdapeftError: as ``sum_of``; or the weights do not add up to 1, or new parameters have different shapes or
            labels.
    """
    _check(deltas, weights, heads)
    if not math.isclose(math.fsum(weights), 1, abs_tol=1e-6):
        raise AdapeftError(
            f"weights = {list(weights)} add up to {math.fsum(weights):g}: the weights of an interpolation have to add "
            f"up to 1. Use a sum for others."
        )
    shares = {name: weight for name, weight in zip(deltas, weights, strict=True) if weight}
    first = next(iter(shares))
    if heads is not None or not any(_whole(deltas[name]) for name in shares):
        return _combined("interpolation", deltas, weights, _whole(deltas[heads]) if heads else {}, heads)
    whole = _whole(deltas[first])
    for other in shares:
        reason = _no_mean(deltas[first], deltas[other])
        if reason:
            owner = first if whole else other
            raise AdapeftError(
                f"{first!r} and {other!r} {reason}, so these cannot be averaged. Choose which to keep: heads={owner!r}."
            )
    mean = {
        key: torch.stack([share * _whole(deltas[name])[key].double() for name, share in shares.items()]).sum(0).to(old)
        for key, old in whole.items()
    }
    return _combined("interpolation", deltas, weights, mean, None)


def _check(deltas: Mapping[str, Delta], weights: Sequence[float], heads: str | None) -> None:
    if not deltas or len(weights) != len(deltas):
        raise AdapeftError(f"weights = {list(weights)}: give one for each of the {len(deltas)} deltas.")
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapeftError(f"weights = {list(weights)}: give finite numbers.")
    check_same_base(deltas)
    if heads is not None and (heads not in deltas or not _whole(deltas[heads])):
        owners = ", ".join(repr(name) for name, delta in deltas.items() if _whole(delta)) or "none of them"
        raise AdapeftError(
            f"heads = {heads!r}: no delta of that name has new parameters; deltas with new parameters: {owners}."
        )


def check_same_base(deltas: Mapping[str, Delta]) -> None:
    """Check that deltas have the same base.

    Raises:
        AdapeftError: fingerprints or shapes of a parameter differ.
    """
    (first, reference), *others = deltas.items()
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, delta in deltas.items():
        for changed, change in delta.changes.items():
            owner, shape = shapes.setdefault(changed, (name, change.part.shape))
            if shape != change.part.shape:
                raise AdapeftError(f"{changed!r} has shape {shape} in {owner!r} and {change.part.shape} in {name!r}.")
    for name, delta in others:
        if delta.fingerprint != reference.fingerprint:
            raise AdapeftError(
                f"{first!r} belongs to a base model of fingerprint {reference.fingerprint[:12]}, {name!r} to one of "
                f"{delta.fingerprint[:12]}: only deltas of one base can be combined."
            )


def _combined(
    method: str, deltas: Mapping[str, Delta], weights: Sequence[float], whole: Mapping[str, Tensor], heads: str | None
) -> Delta:
    terms: dict[str, dict[str, tuple[float, Change]]] = {}
    for (source, delta), weight in zip(deltas.items(), weights, strict=True):
        for name, change in delta.changes.items() if weight else ():
            terms.setdefault(name, {})[source] = (weight, change)
    changes = {name: _sum_of_changes(name, found) for name, found in terms.items()}
    moved = {name: change for name, change in changes.items() if change is not None}
    counted = [delta for delta, weight in zip(deltas.values(), weights, strict=True) if weight]
    reference = next(iter(counted or deltas.values()))
    description: dict[str, Any] = {"method": method, "heads": heads, "sources": list(_sources(deltas, weights))}
    # Task and labels, which a merge needs, belong to the head.
    model = (deltas[heads] if heads else reference).description.get("model")
    names = {name for delta in deltas.values() for name in delta.buffers}
    new = {name: value for name, value in whole.items() if name not in names}
    buffers = {name: value for name, value in whole.items() if name in names}
    described = description if model is None else {"model": model, **description}
    result = Delta(moved, new, reference.fingerprint, described, buffers, reference.digests)
    result.check_finite(
        f"the {method} with weights {list(weights)}", "One of the deltas is not finite, or a weight is too large."
    )
    return result


def _sources(deltas: Mapping[str, Delta], weights: Sequence[float]) -> Iterable[dict[str, Any]]:
    for (name, delta), weight in zip(deltas.items(), weights, strict=True):
        yield {"name": name, "weight": weight, "method": delta.description.get("method")}


def _sum_of_changes(name: str, terms: Mapping[str, tuple[float, Change]]) -> Change | None:
    """Return the weighted sum of the changes of one parameter; None if they cancel."""
    weights, changes = zip(*terms.values(), strict=True)
    if len(changes) == 1:
        return changes[0].scaled(weights[0])
    if not all(change.part.changes_parameter for change in changes):
        first, second, *_ = terms
        raise AdapeftError(
            f"{first!r} and {second!r} both have an adapter behind {name!r}: the sum of two adapters is not one. "
            f"Give one of them weight 0, or swap between the deltas."
        )
    part = changes[0].part
    if all(type(change.part) is type(part) for change in changes):
        parts = [(weight, change.part, change.values) for change, weight in zip(changes, weights, strict=True)]
        if (found := part.sum_of(parts)) is not None:
            return Change(*found)
    total = weighted_sum([Entries.of(change) for change in changes], weights, math.prod(part.shape))
    return smallest_change(total, part.shape)


def _whole(delta: Delta) -> dict[str, Tensor]:
    """Return the new parameters and buffers of a delta, which are values, not differences to the base."""
    return {**delta.new, **delta.buffers}


def _no_mean(a: Delta, b: Delta) -> str | None:
    """Return why the new parameters and buffers of two deltas cannot be averaged; None if they can."""
    # As JSON: class numbers are strings after saving and loading.
    labels = [json.dumps(dict(delta.description.get("model", {})).get("labels"), sort_keys=True) for delta in (a, b)]
    shapes = [{name: value.shape for name, value in _whole(delta).items()} for delta in (a, b)]
    if shapes[0] != shapes[1]:
        return f"{'have different' if all(shapes) else 'do not both have'} new parameters or buffers"
    return "have different labels" if labels[0] != labels[1] else None


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())

"""Swapping of several deltas on one loaded model; the base is restored bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from torch import nn

from adapeft.deltas.applied import Applied
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError, did_you_mean
from adapeft.model.fingerprint import entries_of, fingerprint_model
from adapeft.model.wrappers import bare


class Deltas:
    """Swap deltas on a model in place::

        with Deltas(model, {"reviews": reviews, "mail": mail}) as deltas:
            deltas.use("mail")
            model(**batch)

    In addition to the model, only the deltas, on its device, and the base entries that the active delta replaces are in
    memory. All deltas are checked once, in the constructor, against names, shapes and fingerprint of the model. Other
    code must not write to the weights that the active delta changes.

    Attributes:
        active: name of the active delta; None for the base.

    Raises:
        AdapeftError: the model is not the base of all deltas.
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        model = bare(model, "Deltas")
        _check_all(model, deltas)
        self.active: str | None = None
        self._model = model
        self._deltas = {name: _on_devices(model, delta) for name, delta in deltas.items()}
        self._applied: Applied | None = None

    def use(self, name: str | None) -> None:
        """Replace the active delta in the weights with the delta ``name``; None restores the base.

        Raises:
            AdapeftError: there is no such delta; the active one stays.
        """
        if name is not None and name not in self._deltas:
            raise AdapeftError(f"use({name!r}): no delta of that name.{did_you_mean(name, self._deltas)}")
        if name == self.active:
            return
        if self._applied is not None:
            self._applied.revert()
        self._applied, self.active = None, None
        if name is not None:
            self._applied, self.active = self._deltas[name].install(self._model), name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.use(None)


def _check_all(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Check every delta; the model is hashed once for all deltas with the same new parameters."""
    fingerprints: dict[frozenset[str], str] = {}
    for name, delta in deltas.items():
        new = frozenset(delta.new)
        try:
            delta.check_shapes(model)
            if new not in fingerprints:
                fingerprints[new] = fingerprint_model(model, new)
            delta.check_fingerprint(fingerprints[new], entries_of(model, new))
        except AdapeftError as error:
            raise AdapeftError(f"{name!r}: {error}") from error


def _on_devices(model: nn.Module, delta: Delta) -> Delta:
    """Return the delta with each change on the device of its parameter; adapters are copied on use."""
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    moved = {name: change.to(devices[name]) for name, change in delta.changes.items() if name in devices}
    return replace(delta, changes={**delta.changes, **moved})

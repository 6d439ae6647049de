"""Entries of a subset store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from adapeft.errors import AdapeftError
from adapeft.files.damage import Count, Line, check_yaml, reading
from adapeft.files.json_numbers import Number
from adapeft.sections.paths import SUBSET_SUFFIX
from adapeft.subset.choice import Choice

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


def check_name(name: str) -> None:
    """Raise ``AdapeftError`` if ``name`` could be mistaken for a path or is invalid on some file system."""
    if not re.fullmatch(_NAME, name) or name.endswith(SUBSET_SUFFIX):
        raise AdapeftError(
            f"{name!r} is not a valid name for a subset. Use at most 100 letters, digits, '.', '_' and '-', start with "
            f"a letter or digit, and do not end with {SUBSET_SUFFIX}."
        )


class _Record(BaseModel):
    """An immutable record that ignores unknown keys, such as those of later versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Provenance(_Record):
    """Software that created an artifact; see ``adapeft.files.artifact.provenance``."""

    python: Line | None = None
    versions: dict[Line, Line] = {}
    revision: Line | None = None


class Summary(_Record):
    """Summary of a subset; unknown fields are None.

    Attributes:
        base: folder or hub name of the model for which it was chosen.
        fingerprint: fingerprint of that model.
        budget, count, num_total: number of elements allowed, trained, and of the whole model.
        value, bound, gap: results of the knapsack.
        task, data: ``model.task`` and ``data.train`` of the config.
        metric, before, after: the deciding metric, and all scores before and after training.
        provenance: versions and revision of the software that chose it.
    """

    base: Line | None = None
    fingerprint: Line | None = None
    method: Line | None = None
    granularity: Line | None = None
    budget: Count | None = None
    count: Count
    num_total: Count | None = None
    value: FiniteFloat | None = None
    bound: FiniteFloat | None = None
    gap: FiniteFloat | None = None
    task: Line | None = None
    data: Line | None = None
    metric: Line | None = None
    before: dict[Line, Number] = {}
    after: dict[Line, Number] = {}
    provenance: Provenance = Provenance()

    @classmethod
    def of(
        cls,
        choice: Choice,
        count: int,
        config: str | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Summary:
        """Create the summary of a subset; see ``Subset.summary``.

        Args:
            choice: record of the subset's choice.
            count: number of elements that it trains.
            config: YAML of the run that trained it; None uses the config of its choice.
            metrics: metrics of that run, which may be incomplete.

        Raises:
            AdapeftError: the subset's header or the config is damaged.
        """
        scores = metrics or {}
        recorded = choice.recorded()
        known: dict[str, Any] = {key: recorded[key] for key in cls.model_fields if key in recorded}
        with reading("the description of the subset is damaged", "Choose again.", yaml.YAMLError):
            text = config or choice.config or ""
            check_yaml(text)
            tree = yaml.safe_load(text) or {}
            if tree:
                known |= {"base": tree["model"]["name"], "task": tree["model"]["task"], "data": tree["data"]["train"]}
            known |= {key: scores[key] for key in ("metric", "before", "after") if key in scores}
            return cls(**{**known, "count": count})


class Entry(_Record):
    """A subset in a store.

    Attributes:
        name: name of the subset in the store.
        token: random token of its writer, part of the file's name.
        size: bytes of the file.
        sha256: hash of the file.
        added: time when it was added.
        summary: summary of the subset.
    """

    name: str = Field(pattern=f"^{_NAME}$")
    token: str = Field(pattern="^[0-9a-f]{32}$")
    size: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    added: datetime
    summary: Summary

    @property
    def file(self) -> str:
        """Name of the subset's file, next to the entry."""
        return f"{self.name}@{self.token}{SUBSET_SUFFIX}"

"""What a store says of a subset."""

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
    """Raises ``AdapeftError`` for what could be mistaken for a path, or is none on some file system."""
    if not re.fullmatch(_NAME, name) or name.endswith(SUBSET_SUFFIX):
        raise AdapeftError(
            f"{name!r} is no name for a subset: take letters, digits, '.', '_' and '-', at most 100, a letter or digit "
            f"first, and not {SUBSET_SUFFIX} at the end."
        )


class _Record(BaseModel):
    """Read-only; keys that a later version may add are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Provenance(_Record):
    """What made an artifact; see ``adapeft.files.artifact.provenance``."""

    python: Line | None = None
    versions: dict[Line, Line] = {}
    revision: Line | None = None


class Summary(_Record):
    """What is known of a subset; None where nobody said.

    Attributes:
        base: folder or hub name of the model it was chosen for.
        fingerprint: of that model.
        budget, count, num_total: elements allowed, trained, and of the whole model.
        value, bound, gap: of the knapsack.
        task, data: ``model.task`` and ``data.train`` of the config.
        metric, before, after: what decides, and all scores before and after training.
        provenance: versions and revision of what chose it.
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
        """Summary of a subset; see ``Subset.summary``.

        Args:
            choice: of the subset.
            count: elements that it trains.
            config: YAML of the run that trained it; the one it was chosen under when None.
            metrics: of that run, as far as it came.

        Raises:
            AdapeftError: its header, or the config, is damaged.
        """
        scores = metrics or {}
        said = choice.said()
        known: dict[str, Any] = {key: said[key] for key in cls.model_fields if key in said}
        with reading("what the subset says of itself is damaged", "Choose again.", yaml.YAMLError):
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
        name: by which it is asked for.
        token: drawn by its writer; part of the file's name.
        size: bytes of the file.
        sha256: of the file.
        added: when.
        summary: what is known of it.
    """

    name: str = Field(pattern=f"^{_NAME}$")
    token: str = Field(pattern="^[0-9a-f]{32}$")
    size: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    added: datetime
    summary: Summary

    @property
    def file(self) -> str:
        """Name of the subset's file, beside the entry."""
        return f"{self.name}@{self.token}{SUBSET_SUFFIX}"

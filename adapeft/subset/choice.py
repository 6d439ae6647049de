"""The record of a choice: how a subset came about, as its file says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, FiniteFloat

from adapeft.errors import AdapeftError
from adapeft.files.damage import Count, Header, Line


class Choice(Header):
    """What is known of a choice; None where nobody said.

    What a later version or another maker says of it is kept as it is.

    Attributes:
        method, granularity: what chose, and among what.
        status: how it ended, such as ``optimal``; ``advice`` says what to do where it is not.
        value, bound, gap: predicted loss decrease, the most that it can be, and the distance relative to that.
        additive_value, joint_values: of a joint choice: the sum over its groups, and the value of every set tried.
        solve_seconds: of the solver.
        num_groups, num_chosen: groups or elements, on offer and chosen.
        unspent: elements of the budget that are left because more would not lower the predicted loss.
        rank: of LoRA or of bottlenecks, where one serves all.
        rule: method, seed, budget and options of the rule that dense parts train under.
        drawn_for_empty_choice: whether nothing was chosen and a random draw took its place.
        unreached: names of the parameters that no batch of the calibration gave a gradient.
        memory_per_device, memory_bytes: the limit that took the place of the budget, and what is spent of it.
        budget, num_total: elements allowed, and of the whole model.
        reach: of the training to come.
        seed: of random draws.
        unmapped, mapped: of a transferred choice: roles without a counterpart, and the share of elements with one.
        transferred: where it was transferred from, and how.
        fingerprint: of the base model.
        config: YAML of the run.
        contents: hashes of what the run read.
        source: where a run took the subset from.
        provenance: versions and revision of what wrote the file.
    """

    model_config = ConfigDict(extra="allow")

    method: Line | None = None
    granularity: Line | None = None
    status: Line | None = None
    advice: str | None = None
    value: FiniteFloat | None = None
    bound: FiniteFloat | None = None
    gap: FiniteFloat | None = None
    additive_value: float | None = None
    joint_values: dict[str, float] | None = None
    solve_seconds: float | None = None
    num_groups: Count | None = None
    num_chosen: Count | None = None
    unspent: Count | None = None
    rank: Count | None = None
    rule: dict[str, Any] | None = None
    drawn_for_empty_choice: bool = False
    unreached: list[str] | None = None
    memory_per_device: Count | None = None
    memory_bytes: Count | None = None
    budget: Count | None = None
    num_total: Count | None = None
    reach: float | Literal["inf"] | None = None
    seed: int = 0
    unmapped: list[str] | None = None
    mapped: float | None = None
    transferred: dict[str, str] | None = None
    fingerprint: Line | None = None
    config: str | None = None
    contents: dict[str, str] | None = None
    source: dict[str, str] | None = None
    provenance: dict[str, Any] | None = None

    def with_values(self, **more: Any) -> Choice:
        """The same with more said of it, not checked: what a choice is worth is judged where it is known."""
        unknown = more.keys() - type(self).model_fields.keys()
        if unknown:
            raise TypeError(f"a choice has no {', '.join(sorted(unknown))}")
        return self.model_copy(update=more)

    def said(self) -> dict[str, Any]:
        """What somebody said, as it is."""
        known = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return {**known, **(self.model_extra or {})}

    def needed(self, key: str) -> Any:
        """The value of a key that the reader cannot do without.

        Raises:
            AdapeftError: nobody said it.
        """
        if getattr(self, key) is None:
            raise AdapeftError(f"the subset does not say its {key}. Choose again.")
        return getattr(self, key)

    @classmethod
    def unchecked(cls, said: Mapping[str, Any]) -> Choice:
        """The record of values that are known to be good."""
        return cls.model_construct(**said)

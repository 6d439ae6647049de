"""The record of a choice: how a subset was chosen, as stored in its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, FiniteFloat

from adapeft.errors import AdapeftError
from adapeft.files.damage import Count, Header, Line


class Choice(Header):
    """The record of a choice; fields that were not recorded are None.

    Additional fields, such as those of later versions or other tools, are kept unchanged.

    Attributes:
        method, granularity: method of the choice, and granularity of its groups.
        status: status of the solution, such as ``optimal``; ``advice`` is the remedy if it is not optimal.
        value, bound, gap: predicted loss decrease, its upper bound, and the relative distance between them.
        additive_value, joint_values: for a joint choice, the sum over its groups, and the value of every set tried.
        joint_value: if ``value`` is the sum over groups, the loss decrease along all their directions at once, with the
            cross terms of their curvature. Training turns, and does more than this, and less than the sum.
        share: with ``select.budget: auto``, ``value`` as a share of that of the largest budget.
        reliability: how much of the direction of half A holds on half B, at most 1; about 0 if the slopes are noise.
        directions, candidate_directions: effective ranks of the gradients of the chosen parameters and of all
            candidates: in how many ways each can change the outputs. A later choice from the same statistics has those
            of the first one.
        lora_from: for a language model, the smallest budget at which LoRA is advised.
        solve_seconds: time of the solver.
        num_groups, num_chosen: number of candidate and of chosen groups or elements.
        unspent: elements of the budget that are left because more would not lower the predicted loss.
        num_drawn: elements that were drawn for the part of the budget that the choice left.
        rank: rank of LoRA or size of bottlenecks, if all have the same.
        rule: method, seed, budget and options of the rule under which dense parts are trained.
        drawn_for_empty_choice: whether nothing was chosen and a random draw was used instead.
        unreached: names of the parameters that got no gradient from any batch of the calibration.
        memory_per_device, memory_bytes: memory limit that replaced the budget, and the bytes used of it.
        budget, num_total: number of elements allowed, and of the whole model.
        reach: reach of the planned training.
        seed: random seed of draws.
        unmapped, mapped: for a transferred choice, roles without a counterpart, and the fraction of elements with one.
        transferred: source and method of a transfer.
        fingerprint: fingerprint of the base model.
        config: YAML of the run.
        contents: hashes of the files that the run read.
        source: origin of a subset that the run did not choose itself.
        provenance: versions and revision of the software that wrote the file.
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
    joint_value: FiniteFloat | None = None
    share: FiniteFloat | None = None
    reliability: FiniteFloat | None = None
    directions: FiniteFloat | None = None
    candidate_directions: FiniteFloat | None = None
    lora_from: Count | None = None
    solve_seconds: float | None = None
    num_groups: Count | None = None
    num_chosen: Count | None = None
    unspent: Count | None = None
    num_drawn: Count | None = None
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

    @property
    def adds_up(self) -> bool:
        """Whether ``value`` is the sum over groups, each as if trained alone: more than they can do together."""
        return self.value is not None and self.unspent is None and self.additive_value is None

    @property
    def is_drawn(self) -> bool:
        """Whether all of it was drawn at random."""
        return self.status == "drawn"

    def with_values(self, **more: Any) -> Choice:
        """Return a copy with these fields set. Values are not validated; the caller checks them."""
        unknown = more.keys() - type(self).model_fields.keys()
        if unknown:
            raise TypeError(f"a choice has no {', '.join(sorted(unknown))}")
        return self.model_copy(update=more)

    def recorded(self) -> dict[str, Any]:
        """Return the fields that were recorded, unchanged."""
        known = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return {**known, **(self.model_extra or {})}

    def needed(self, key: str) -> Any:
        """Return the value of a required field.

        Raises:
            AdapeftError: the field was not recorded.
        """
        if getattr(self, key) is None:
            raise AdapeftError(f"the subset does not record its {key}. Choose again.")
        return getattr(self, key)

    @classmethod
    def unchecked(cls, recorded: Mapping[str, Any]) -> Choice:
        """Create the record without validation, from values that are known to be valid."""
        return cls.model_construct(**recorded)


def in_one_step(joint_value: float | None) -> str:
    """Return what is said of the joint value next to a sum over groups; nothing if it is unknown."""
    return "" if joint_value is None else f", {joint_value:.3g} in one step of all"

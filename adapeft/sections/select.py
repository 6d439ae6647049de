"""The config's ``select`` section, as far as all methods have it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from adapeft.sections.budget import Budget
from adapeft.sections.section import Bytes, Harmless, Limit, Patterns, Reach, Section

Granularity = Literal["tensor", "row", "element", "role"]


class Select(Section):
    """Which parameters deserve training, and how many.

    Every method has a class of its own, which names it in ``method`` and adds the options that it alone has.

    Attributes:
        granularities: what the method can choose together, its own habit first.
    """

    granularities: ClassVar[tuple[Granularity, ...]] = ("element", "row", "tensor", "role")

    method: str = Field(description="how parameters are ranked")
    groups: Literal["auto", Granularity] = Field(
        default="auto",
        description="what is chosen together; auto: row for adapeft, else tensor or element as the method does; role: "
        "the tensors of one name in all layers",
    )
    budget: Harmless[Limit] = Field(
        default=Budget.parse("0.5%"),
        description="most that is trained: a fraction (0.5%, 0.005) or a count (100000, 100k, 1.5M)",
    )
    memory_per_device: Harmless[Bytes | None] = Field(
        default=None, description="most that training may hold on a device, as 24GiB; takes the place of budget"
    )
    calibration: int = Field(
        default=512, ge=2, description="examples to measure on, half for the direction, half for its gain"
    )
    batch_size: PositiveInt = Field(default=16, description="examples in a calibration batch, over all workers")
    micro_batch_size: Harmless[PositiveInt | None] = Field(
        default=None, description="examples a worker holds at once; null: its share"
    )
    reach: Harmless[Reach] = Field(
        default="auto", description="how far training moves along the direction; inf: as far as is best"
    )
    always_train: Patterns = Field(
        default=("auto",),
        description="patterns of parameters trained outside the budget; auto: the new head, if there is one",
    )
    include: Patterns = Field(default=(), description="patterns of parameters that may be chosen; none: all may")
    exclude: Patterns = Field(default=(), description="patterns of parameters that may not be chosen")
    warmup_steps: Literal["auto"] | NonNegativeInt = Field(
        default="auto",
        description="steps of training always_train alone before measuring; auto: what the method asks for",
    )
    statistics: Harmless[str | None] = Field(
        default=None, description="folder of another run whose measurements are used again"
    )

    @classmethod
    def tag(cls) -> str:
        """The method's name."""
        (name,) = get_args(cls.model_fields["method"].annotation)
        return name

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        if self.granularity not in self.granularities:
            raise ValueError(f"groups = {self.groups}: {self.method} chooses by {' or '.join(self.granularities)}")
        self.check()
        return self

    def check(self) -> None:
        """Raises ``ValueError`` where keys do not go together."""
        if self.memory_per_device is None:
            return
        given = f"memory_per_device = {self.memory_per_device}"
        if self.budget != type(self).model_fields["budget"].default:
            raise ValueError(f"{given}: budget = {self.budget} limits the same; leave one of them out")
        if (how := self.counts_parameters) is not None:
            raise ValueError(f"{given}: {how} takes a budget of parameters; leave memory_per_device out")

    @property
    def granularity(self) -> Granularity:
        """``groups`` with auto decided by the method."""
        return self.granularities[0] if self.groups == "auto" else self.groups

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is chosen among: the granularity, or several kinds of parts."""
        return (self.granularity,)

    @property
    def counts_parameters(self) -> str | None:
        """What makes the budget a number of parameters; None where it may be bytes."""
        return self.method

    @property
    def displacing(self) -> str | None:
        """The key because of which measuring moves the candidates' weights, and back; None where none does."""
        return None

    def measured(self) -> dict[str, Any]:
        """What is measured under keys that do not say it, such as ``groups: auto``."""
        return {"groups": self.granularity}

    def own(self) -> dict[str, Any]:
        """The options that the method alone has, as plain values."""
        return self.model_dump(mode="json", exclude=set(Select.model_fields))

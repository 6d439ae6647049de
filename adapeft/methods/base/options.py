"""What the options of several methods have in common. Imports no torch, as the config reads them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adapeft.sections.section import Harmless
from adapeft.sections.select import Select


class ValuedOptions(Select):
    """Options of a method that gives every group or element a value."""

    scope: Harmless[Literal["global", "tensor"]] = Field(
        default="global", description="elements compete in the whole model, or in each tensor for its share"
    )
    solver: Harmless[Literal["knapsack", "greedy"]] = Field(
        default="knapsack", description="how groups are chosen; greedy: by value per parameter, as in the paper"
    )
    if_empty: Harmless[Literal["error", "random"]] = Field(
        default="error",
        description="when no group promises a lower loss: stop, unless always_train has anything to train; random: "
        "train a random draw of the same budget",
    )

    @property
    def counts_parameters(self) -> str | None:
        return None

    def check(self) -> None:
        super().check()
        if self.scope != "global" and self.granularity != "element":
            raise ValueError(
                f"scope = {self.scope}: only single elements compete, and {self.method} by {self.granularity} chooses "
                "none by value; leave scope out"
            )
        if self.solver != "knapsack" and self.granularity == "element":
            raise ValueError(
                f"solver = {self.solver}: {self.method} by {self.granularity} solves no knapsack; leave solver out"
            )


class RuleOptions(Select):
    """Options of a method that decides while training; what such a method adds to the section goes to its rule."""

    granularities = ("element",)

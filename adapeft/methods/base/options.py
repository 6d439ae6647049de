"""Base classes of the options of several methods. They import no torch, because the config reads them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adapeft.sections.section import Harmless
from adapeft.sections.select import OnQuantized, Select


class ValuedOptions(Select):
    """Options of a method that values every group or element."""

    scope: Harmless[Literal["global", "tensor"]] = Field(
        default="global", description="elements compete within the whole model, or within each tensor for its share"
    )
    solver: Harmless[Literal["knapsack", "greedy"]] = Field(
        default="knapsack",
        description="solver that chooses groups; greedy: by value per parameter, as in the paper",
    )
    if_empty: Harmless[Literal["error", "random"]] = Field(
        default="error",
        description="action if no group promises a lower loss; error: stop, unless always_train trains something; "
        "random: train a random draw of the same budget",
    )

    @property
    def counts_parameters(self) -> str | None:
        return None

    def check(self) -> None:
        super().check()
        if self.scope != "global" and self.granularity != "element":
            raise ValueError(
                f"scope = {self.scope}: applies only to single elements, but {self.method} by {self.granularity} "
                "chooses none by value; leave scope out"
            )
        if self.solver != "knapsack" and self.granularity == "element":
            raise ValueError(
                f"solver = {self.solver}: {self.method} by {self.granularity} does not solve a knapsack; set "
                "groups: row, or leave solver out"
            )


class RuleOptions(Select):
    """Options of a method that decides during training; options that such a method adds are passed to its rule."""

    granularities = ("element",)

    @property
    def quantized_matrices(self) -> OnQuantized:
        return "refused"

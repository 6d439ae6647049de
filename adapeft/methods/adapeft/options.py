"""The options of ``adapeft``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from adapeft.methods.base.options import ValuedOptions
from adapeft.sections.section import LearningRate, PartOf


class AdaPEFTOptions(ValuedOptions):
    """Options of ``select.method: adapeft``, the default."""

    granularities = ("row", "element", "tensor", "role")

    method: Literal["adapeft"] = "adapeft"
    direction: Literal["adam", "gradient"] = Field(default="adam", description="where training would step")
    curvature: Literal["sampled-labels", "parabola"] = Field(
        default="sampled-labels",
        description="what bends adapeft's loss; parabola: fitted to 4 displaced losses a group, as in the paper",
    )
    probe_steps: NonNegativeInt = Field(
        default=0, description="steps of full training along which adapeft measures, and which it then takes back"
    )
    probe_points: Annotated[int, PartOf("probe_steps")] = Field(
        default=4, ge=2, description="points of them, first to last, whose influences are averaged"
    )
    probe_learning_rate: Annotated[LearningRate, PartOf("probe_steps")] = Field(
        default=5e-5, description="of that training, by Adam"
    )
    shrinkage: bool = Field(default=True, description="shrink the noisy curvature of single elements towards its mean")
    joint: Literal["auto"] | bool = Field(
        default="auto",
        description="let adapeft value groups together, with the cross terms of their curvature; single elements with "
        "the most that these can be; auto: single elements, except with reach: inf, scope: tensor or probe_steps",
    )
    options: tuple[Literal["row", "tensor", "lora"], ...] = Field(
        default=(),
        description="let adapeft choose for every matrix among rows of it, the whole and LoRA, as [row, tensor, lora]; "
        "none: groups says what is chosen",
    )
    lora_ranks: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8, 16), description="ranks of LoRA among the options", min_length=1
    )

    def check(self) -> None:
        if self.joint is True:
            self._check_joint()
        if self.curvature != "sampled-labels":
            self._check_parabola()
        self._check_probe()
        super().check()
        if self.options and self.granularity != "row":
            raise ValueError(
                f"options = {list(self.options)}: only adapeft chooses among kinds, and among rows with groups: row; "
                f"here it is {self.method} by {self.granularity}"
            )
        if self.options and self.joint is True:
            raise ValueError("options: joint = true values groups of one kind; leave one of them out")
        if self.options and self.probe_steps:
            raise ValueError(
                f"options: probe_steps = {self.probe_steps} accumulates groups of one kind; leave one of them out"
            )
        if self.lora_ranks != type(self).model_fields["lora_ranks"].default and "lora" not in self.options:
            raise ValueError(f"lora_ranks = {list(self.lora_ranks)}: lora is not among the options")

    def _check_joint(self) -> None:
        if self.solver != "knapsack":
            raise ValueError("solver = greedy: joint is a choice of its own; leave one of them out")
        if self.granularity == "element" and self.reach == math.inf:
            raise ValueError("reach = inf: joint then is best with one element alone; leave one of them out")
        if self.granularity == "element" and self.scope != "global":
            raise ValueError(f"scope = {self.scope}: joint weighs all tensors together; leave one of them out")

    def _check_parabola(self) -> None:
        if self.granularity not in ("tensor", "role"):
            raise ValueError(
                f"curvature = parabola: 4K + 1 forward passes over half the calibration for K groups are too many by "
                f"{self.granularity}; choose groups: tensor or role"
            )
        if self.joint is True:
            raise ValueError("curvature = parabola: losses tell no cross terms; leave joint or curvature out")

    def _check_probe(self) -> None:
        if not self.probe_steps:
            for key in ("probe_points", "probe_learning_rate"):
                if (given := getattr(self, key)) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} = {given}: there is no probe; give probe_steps too, or leave {key} out")
            return
        if self.joint is True:
            raise ValueError(
                f"probe_steps = {self.probe_steps}: cross terms do not add up over points; leave it or joint out"
            )
        if self.probe_points > self.probe_steps + 1:
            raise ValueError(
                f"probe_points = {self.probe_points}: {self.probe_steps} steps have {self.probe_steps + 1} points; "
                "lower probe_points or raise probe_steps"
            )

    @property
    def displacing(self) -> str | None:
        if self.probe_steps:
            return f"probe_steps = {self.probe_steps}"
        return "curvature = parabola" if self.curvature == "parabola" else None

    @property
    def counts_parameters(self) -> str | None:
        if self.options:
            return f"options = {list(self.options)}"
        return "joint = true" if self.chooses_jointly and self.granularity != "element" else None

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.options or super().kinds

    def measured(self) -> dict[str, Any]:
        # Single elements are measured alike either way.
        return {**super().measured(), "joint": self.chooses_jointly and self.granularity != "element"}

    @property
    def chooses_jointly(self) -> bool:
        """``joint`` with auto decided: single elements are valued together, unless another key says how they are."""
        if self.joint != "auto":
            return self.joint
        is_planned = self.reach != math.inf and self.scope == "global" and not self.probe_steps
        return self.granularity == "element" and is_planned

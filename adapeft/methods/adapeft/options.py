"""The options of ``adapeft``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from adapeft.methods.base.options import ValuedOptions
from adapeft.sections.section import Harmless, LearningRate, PartOf
from adapeft.sections.select import Granularity, OnQuantized, Select
from adapeft.servers import MAX_RANK

_SMALL = 10**9
"""Parameters of a model up to which ``measure: auto`` is exact."""


class AdaPEFTOptions(ValuedOptions):
    """Options of ``select.method: adapeft``, the default."""

    granularities = ("element", "row", "tensor", "role")
    predicts_loss = True

    method: Literal["adapeft"] = "adapeft"
    measure: Harmless[Literal["auto", "low-rank", "exact"]] = Field(
        default="auto",
        description="low-rank: gradients seen through leaves of select.rank, with the memory of LoRA; exact: whole "
        "gradients; auto: low-rank for quantized models and those above 1 billion parameters, where every option "
        "supports it",
    )
    rank: Annotated[Harmless[PositiveInt], PartOf("measure")] = Field(
        default=16, description="rank of the windows of a low-rank measurement"
    )
    direction: Literal["adam", "gradient"] = Field(default="adam", description="direction of training steps")
    curvature: Literal["sampled-labels", "parabola"] = Field(
        default="sampled-labels",
        description="source of the curvature; parabola: fitted to 4 displaced losses per group, as in the paper",
    )
    probe_steps: NonNegativeInt = Field(
        default=0, description="steps of a full training (the probe) along which adapeft measures; they are undone"
    )
    probe_points: Annotated[int, PartOf("probe_steps")] = Field(
        default=4, ge=2, description="points of the probe, from first to last step, whose influences are averaged"
    )
    probe_learning_rate: Annotated[LearningRate, PartOf("probe_steps")] = Field(
        default=5e-5, description="Adam learning rate of the probe"
    )
    shrinkage: bool = Field(default=True, description="shrink the noisy curvature of single elements towards its mean")
    joint: Harmless[Literal["auto"] | bool] = Field(
        default="auto",
        description="value groups jointly, with the cross terms of their curvature, and single elements with an upper "
        "bound of these; auto: only single elements, and not with reach: inf, scope: tensor or probe_steps",
    )
    fill: Annotated[Harmless[Literal["auto"] | bool], PartOf("joint")] = Field(
        default="auto",
        description="spend what the joint choice of single elements leaves of the budget on a uniform draw of others; "
        "auto: all of the budget where slopes are noise",
    )
    options: tuple[Literal["row", "tensor", "lora"], ...] = Field(
        default=(),
        description="kinds that adapeft may choose for a matrix, such as [row, tensor, lora] for some of its rows, the "
        "whole matrix or LoRA; empty: only the units in groups",
    )
    lora_ranks: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8, 16), description="ranks of LoRA among the options", min_length=1
    )

    def check(self) -> None:
        if self.measure == "low-rank" and self.displacing:
            raise ValueError(
                f"measure = low-rank: {self.displacing} needs the gradient of every single element; set measure: exact"
            )
        if self.rank != type(self).model_fields["rank"].default and (self.measure == "exact" or self.displacing):
            raise ValueError(f"rank = {self.rank}: the measurement is exact and has no rank; leave rank out")
        if self.joint is True:
            self._check_joint()
        if self.fill is True and not (self.chooses_jointly and self.granularity == "element"):
            raise ValueError(
                "fill = true: only the joint choice of single elements leaves budget unspent (groups: element without "
                "joint: false, reach: inf, scope: tensor or probe_steps); leave fill out"
            )
        if self.curvature != "sampled-labels":
            self._check_parabola()
        self._check_probe()
        super().check()
        if self.options and self.granularity != "row":
            raise ValueError(
                f"options = {list(self.options)}: a choice among kinds needs groups: row, but here {self.method} "
                f"chooses by {self.granularity}; set groups: row, or leave options out"
            )
        if self.options and self.joint is True:
            raise ValueError("options: joint = true can only value groups of one kind; leave one of them out")
        if self.options and self.probe_steps:
            raise ValueError(
                f"options: probe_steps = {self.probe_steps} can only accumulate groups of one kind; leave one of them "
                f"out"
            )
        if self.lora_ranks != type(self).model_fields["lora_ranks"].default and "lora" not in self.options:
            raise ValueError(
                f"lora_ranks = {list(self.lora_ranks)}: lora is not among the options; add it, or leave lora_ranks out"
            )

    def _check_joint(self) -> None:
        if self.solver != "knapsack":
            raise ValueError("solver = greedy: joint = true ignores the solver; leave one of them out")
        if self.granularity == "element" and self.reach == math.inf:
            raise ValueError("reach = inf: joint = true would then choose a single element; leave one of them out")
        if self.granularity == "element" and self.scope != "global":
            raise ValueError(f"scope = {self.scope}: joint = true values all tensors together; leave one of them out")

    def _check_parabola(self) -> None:
        if self.granularity not in ("tensor", "role"):
            raise ValueError(
                f"curvature = parabola: 4K + 1 forward passes over half the calibration for K groups are too many by "
                f"{self.granularity}; set groups: tensor or role"
            )
        if self.joint is True:
            raise ValueError("curvature = parabola: gives no cross terms for joint = true; leave one of them out")

    def _check_probe(self) -> None:
        if not self.probe_steps:
            for key in ("probe_points", "probe_learning_rate"):
                if (given := getattr(self, key)) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} = {given}: there is no probe; set probe_steps too, or leave {key} out")
            return
        if self.joint is True:
            raise ValueError(
                f"probe_steps = {self.probe_steps}: cross terms do not add up over the points of a probe; leave out "
                f"probe_steps or joint"
            )
        if self.probe_points > self.probe_steps + 1:
            raise ValueError(
                f"probe_points = {self.probe_points}: {self.probe_steps} steps have {self.probe_steps + 1} points; "
                "lower probe_points or raise probe_steps"
            )

    @property
    def granularity(self) -> Granularity:
        """``groups``; auto: single elements, but rows where only these can be served or are the unit of the options."""
        is_of_rows = self.groups == "auto" and (self.servable or self.options)
        return "row" if is_of_rows else super().granularity

    @property
    def leaves_kind_open(self) -> bool:
        """Whether no key asks for a certain kind: ``groups`` is auto, this method's own keys have their defaults."""
        own = type(self).model_fields.keys() - Select.model_fields.keys()
        return (
            self.groups == "auto"
            and self.memory_per_device is None
            and self.statistics is None
            and not self.budget.is_auto
            and all(getattr(self, name) == type(self).model_fields[name].default for name in own)
        )

    @property
    def quantized_matrices(self) -> OnQuantized:
        is_whole = self.granularity in ("tensor", "role") or "tensor" in self.options
        return "refused" if is_whole else "candidate"

    def window_rank(self, num_parameters: int, *, is_quantized: bool = False) -> int | None:
        if self.measure == "auto":
            is_low_rank = (num_parameters > _SMALL or is_quantized) and not self.displacing
        else:
            is_low_rank = self.measure == "low-rank"
        return self.rank if is_low_rank else None

    @property
    def displacing(self) -> str | None:
        if self.probe_steps:
            return f"probe_steps = {self.probe_steps}"
        return "curvature = parabola" if self.curvature == "parabola" else None

    @property
    def depends_on_reach(self) -> bool:
        return self.reach == "auto"

    @property
    def fills(self) -> bool:
        return self.fill is not False and self.granularity == "element" and self.chooses_jointly

    @property
    def draws_for_noise(self) -> bool:
        return self.fills and self.fill == "auto"

    @property
    def counts_parameters(self) -> str | None:
        if self.options:
            return f"options = {list(self.options)}"
        return "joint = true" if self.chooses_jointly and self.granularity != "element" else None

    @property
    def unservable(self) -> str | None:
        if "tensor" in self.options:
            return f"options = {list(self.options)} can train a matrix whole"
        if "lora" in self.options and max(self.lora_ranks) > MAX_RANK:
            return f"lora_ranks = {list(self.lora_ranks)}"
        return super().unservable

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.options or super().kinds

    def measured(self, num_parameters: int, *, is_quantized: bool = False) -> dict[str, Any]:
        rank = self.window_rank(num_parameters, is_quantized=is_quantized)
        windows = {"measure": "low-rank", "rank": rank} if rank else {}
        return {**super().measured(num_parameters, is_quantized=is_quantized), **windows}

    @property
    def chooses_jointly(self) -> bool:
        """``joint`` with auto resolved: single elements are valued jointly, unless another key prevents it."""
        if self.joint != "auto":
            return self.joint
        is_planned = self.reach != math.inf and self.scope == "global" and not self.probe_steps
        return self.granularity == "element" and is_planned

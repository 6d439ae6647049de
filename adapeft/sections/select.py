"""The config's ``select`` section."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from adapeft.sections.budget import Budget
from adapeft.sections.rules import OPTIONS, parse_options
from adapeft.sections.section import Bytes, LearningRate, Limit, Patterns, Reach, Section

Placement = Literal["pfeiffer", "houlsby"]
Method = Literal[
    "full",
    "random",
    "mixout",
    "mixout-reset",
    "bitfit",
    "lora",
    "adapter",
    "magnitude",
    "diff-pruning",
    "child-tuning-f",
    "child-tuning-d",
    "child-pruning",
    "fish",
    "sam",
    "adapeft",
]
Granularity = Literal["tensor", "row", "element", "role"]

# What a method can choose together, its own habit first.
ANY_GRANULARITY: tuple[Granularity, ...] = ("element", "row", "tensor", "role")
GRANULARITIES: dict[str, tuple[Granularity, ...]] = {
    "full": ("tensor",),
    "bitfit": ("tensor",),
    "lora": ("tensor",),
    "adapter": ("tensor",),
    "adapeft": ("row", "element", "tensor", "role"),
    **dict.fromkeys(OPTIONS, ("element",)),
}
_WITHOUT_VALUES = ("full", "random", "bitfit", "lora", "adapter", *OPTIONS)


class Numbers(dict[str, Any]):
    """Keys that depend on another key's value; hashable like the rest of a config, which nobody changes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Select(Section):
    """Which parameters deserve training, and how many."""

    method: Method = Field(default="adapeft", description="how parameters are ranked")
    groups: Literal["auto", Granularity] = Field(
        default="auto",
        description="what is chosen together; auto: row for adapeft, else tensor or element as the method does; role: "
        "the tensors of one name in all layers",
    )
    budget: Limit = Field(
        default=Budget.parse("0.5%"),
        description="most that is trained: a fraction (0.5%, 0.005) or a count (100000, 100k, 1.5M)",
    )
    memory_per_device: Bytes | None = Field(
        default=None, description="most that training may hold on a device, as 24GiB; takes the place of budget"
    )
    calibration: int = Field(
        default=512, ge=2, description="examples to measure on, half for the direction, half for its gain"
    )
    batch_size: PositiveInt = Field(default=16, description="examples in a calibration batch, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="examples a worker holds at once; null: its share"
    )
    direction: Literal["adam", "gradient"] = Field(default="adam", description="where training would step")
    curvature: Literal["sampled-labels", "parabola"] = Field(
        default="sampled-labels",
        description="what bends adapeft's loss; parabola: fitted to 4 displaced losses a group, as in the paper",
    )
    reach: Reach = Field(
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
    probe_steps: NonNegativeInt = Field(
        default=0, description="steps of full training along which adapeft measures, and which it then takes back"
    )
    probe_points: int = Field(
        default=4, ge=2, description="points of them, first to last, whose influences are averaged"
    )
    probe_learning_rate: LearningRate = Field(default=5e-5, description="of that training, by Adam")
    shrinkage: bool = Field(default=True, description="shrink the noisy curvature of single elements towards its mean")
    scope: Literal["global", "tensor"] = Field(
        default="global", description="elements compete in the whole model, or in each tensor for its share"
    )
    solver: Literal["knapsack", "greedy"] = Field(
        default="knapsack", description="how groups are chosen; greedy: by value per parameter, as in the paper"
    )
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
    if_empty: Literal["error", "random"] = Field(
        default="error",
        description="when no group promises a lower loss: stop, unless always_train has anything to train; random: "
        "train a random draw of the same budget",
    )
    placement: Placement = Field(
        default="pfeiffer", description="where adapters stand: behind each feed-forward; houlsby: each attention too"
    )
    statistics: str | None = Field(default=None, description="folder of another run whose measurements are used again")

    rule: dict[str, Any] = Field(
        default={},
        validate_default=True,
        description="numbers of a method that moves its mask while training: "
        + "; ".join(f"{method}: {', '.join(options.model_fields)}" for method, options in OPTIONS.items()),
    )

    @field_validator("rule")
    @classmethod
    def _rule_is_the_methods(cls, rule: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if rule and "method" in info.data:
            parse_options(info.data["method"], rule)
        return Numbers(rule)

    @model_validator(mode="after")
    def _keys_go_together(self) -> Select:
        possible = GRANULARITIES.get(self.method, ANY_GRANULARITY)
        if self.granularity not in possible:
            raise ValueError(f"groups = {self.groups}: {self.method} chooses by {' or '.join(possible)}")
        if self.joint is True:
            self._check_joint()
        if self.curvature != "sampled-labels":
            self._check_parabola()
        self._check_probe()
        if self.scope != "global" and (self.method in _WITHOUT_VALUES or self.granularity != "element"):
            raise ValueError(
                f"scope = {self.scope}: only single elements compete, and {self.method} by {self.granularity} chooses "
                "none by value; leave scope out"
            )
        if self.placement != "pfeiffer" and self.method != "adapter":
            raise ValueError(f"placement = {self.placement}: {self.method} places no adapters; leave placement out")
        if self.solver != "knapsack" and (self.method in _WITHOUT_VALUES or self.granularity == "element"):
            raise ValueError(
                f"solver = {self.solver}: {self.method} by {self.granularity} solves no knapsack; leave solver out"
            )
        if self.if_empty != "error" and self.method in _WITHOUT_VALUES:
            raise ValueError(
                f"if_empty = {self.if_empty}: {self.method} asks no group for a promise, so its choice is never empty; "
                "leave if_empty out"
            )
        if self.options and (self.method != "adapeft" or self.granularity != "row"):
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
        if self.memory_per_device is not None:
            self._check_memory()
        if self.lora_ranks != type(self).model_fields["lora_ranks"].default and "lora" not in self.options:
            raise ValueError(f"lora_ranks = {list(self.lora_ranks)}: lora is not among the options")
        return self

    def _check_memory(self) -> None:
        given = f"memory_per_device = {self.memory_per_device}"
        if self.budget != type(self).model_fields["budget"].default:
            raise ValueError(f"{given}: budget = {self.budget} limits the same; leave one of them out")
        if self.method in _WITHOUT_VALUES:
            how: str = self.method
        elif self.options:
            how = f"options = {list(self.options)}"
        elif self.chooses_jointly and self.granularity != "element":
            how = "joint = true"
        else:
            return
        raise ValueError(f"{given}: {how} takes a budget of parameters; leave memory_per_device out")

    def _check_joint(self) -> None:
        if self.method != "adapeft":
            raise ValueError(
                f"joint = true: {self.method} by {self.granularity} has no cross terms; choose method: adapeft, or "
                "leave joint out"
            )
        if self.solver != "knapsack":
            raise ValueError("solver = greedy: joint is a choice of its own; leave one of them out")
        if self.granularity == "element" and self.reach == math.inf:
            raise ValueError("reach = inf: joint then is best with one element alone; leave one of them out")
        if self.granularity == "element" and self.scope != "global":
            raise ValueError(f"scope = {self.scope}: joint weighs all tensors together; leave one of them out")

    def _check_parabola(self) -> None:
        if self.method != "adapeft":
            raise ValueError(f"curvature = parabola: {self.method} measures none; leave curvature out")
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
                if (given := getattr(self, key)) != Select.model_fields[key].default:
                    raise ValueError(f"{key} = {given}: there is no probe; give probe_steps too, or leave {key} out")
            return
        if self.method != "adapeft":
            raise ValueError(
                f"probe_steps = {self.probe_steps}: {self.method} measures no influence along a probe; leave it out"
            )
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
    def displaces_weights(self) -> bool:
        """Whether measuring moves the candidates' weights, and back."""
        return self.curvature == "parabola" or self.probe_steps > 0

    @property
    def chooses_jointly(self) -> bool:
        """``joint`` with auto decided: single elements are valued together, unless another key says how they are."""
        if self.joint != "auto":
            return self.joint
        is_planned = self.reach != math.inf and self.scope == "global" and not self.probe_steps
        return self.method == "adapeft" and self.granularity == "element" and is_planned

    @property
    def granularity(self) -> Granularity:
        """``groups`` with auto decided by the method."""
        return GRANULARITIES.get(self.method, ANY_GRANULARITY)[0] if self.groups == "auto" else self.groups

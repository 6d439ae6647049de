"""What a run is asked to do: the config's sections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from adapeft.config.budget import Budget
from adapeft.config.paths import DATA_SUFFIXES, PLACES, absolute, impossible
from adapeft.config.rules import OPTIONS, parse_options
from adapeft.errors import AdapeftError
from adapeft.files.json_numbers import infinity_in_words

Task = Literal["sequence-classification", "causal-lm"]
Metric = Literal["auto", "accuracy", "matthews", "f1", "accuracy_f1", "pearson_spearman", "loss", "perplexity"]
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


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Reach = Annotated[Literal["auto"] | PositiveFloat, PlainSerializer(infinity_in_words)]
Limit = Annotated[
    Budget,
    PlainValidator(Budget.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}),
]

# A step of Adam divides by 1 - β₁: above 3e37 that overflows float32, and a worker fails. Below, training diverges.
LearningRate = Annotated[float, Field(gt=0, le=1e37, allow_inf_nan=False)]

Bytes = Annotated[
    ByteSize,
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer", "exclusiveMinimum": 0}]}),
]


class Numbers(dict[str, Any]):
    """Keys that depend on another key's value; hashable like the rest of a config, which nobody changes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Section(BaseModel):
    """Part of a config: read-only, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """The pretrained transformer."""

    name: str = Field(description="folder or hub name of the pretrained model", min_length=1)
    task: Task = Field(description="what the model is trained to do")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of the frozen weights")
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        default="highest",
        description="of float32 matrix products, as in torch.set_float32_matmul_precision: high is TF32 on NVIDIA's "
        "GPUs, medium bfloat16 on processors that have it",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(
            default=None,
            description="how attention is computed; null: as transformers picks; on processors eager is faster for "
            "short texts",
        )
    )
    trust_remote_code: bool = Field(default=False, description="run model code that comes from the hub")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations: less memory, more time")


class Data(Section):
    """Examples to train on and to be judged by."""

    train: str = Field(
        description=f"file ({', '.join(DATA_SUFFIXES)}) or hub data set: name, name@split or name:config@split",
        min_length=1,
    )
    evaluation: str = Field(description="held-out examples, spelled like train; glue:cola@validation", min_length=1)
    text: str = Field(default="text", description="column of the text")
    text_pair: str | None = Field(default=None, description="column of the second text, for tasks on pairs")
    label: str = Field(default="label", description="column of the label; not read for causal-lm")
    max_length: PositiveInt = Field(default=128, description="tokens an example is cut to")
    padding: Literal["longest", "max_length"] = Field(
        default="longest",
        description="how long a batch is: its longest example; max_length: as data.max_length, for models whose "
        "predictions depend on the padding",
    )
    metric: Metric = Field(default="auto", description="how evaluation judges; auto fits the task and its labels")


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


class Train(Section):
    """How the chosen parameters are trained."""

    # Bounded, because the rate of every step is listed before the first one.
    epochs: PositiveFloat = Field(
        default=3, le=100_000, description="passes over the training data", allow_inf_nan=False
    )
    max_steps: PositiveInt | None = Field(
        default=None, le=10_000_000, description="optimizer steps; if given, epochs is not used"
    )
    learning_rate: LearningRate = Field(default=1e-3, description="highest step size of AdamW")
    batch_size: PositiveInt = Field(default=32, description="examples an optimizer step sees, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="examples a worker holds at once; null: its share"
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = Field(
        default="random", description="group_by_length: batches of examples of about one length, for less padding"
    )
    weight_decay: NonNegativeFloat = Field(default=0.01, description="decoupled weight decay", allow_inf_nan=False)
    warmup_ratio: float = Field(
        default=0.1, ge=0, lt=1, description="part of the steps over which the learning rate rises"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the learning rate falls afterwards"
    )
    max_grad_norm: NonNegativeFloat | None = Field(
        default=1.0, description="gradients are clipped to this norm; null or 0: off"
    )
    max_skipped_steps: NonNegativeInt = Field(
        default=0, description="steps to leave out because their loss or gradient is not finite; one more ends the run"
    )
    eval_steps: PositiveInt | None = Field(default=None, description="steps between evaluations; null: once an epoch")
    save_steps: PositiveInt | None = Field(
        default=None, description="steps between resumable checkpoints; null: once an epoch"
    )
    subset: str | None = Field(
        default=None,
        description="saved subset to train instead of choosing: file, URL, or name in $ADAPEFT_STORE",
    )
    logging_steps: PositiveInt = Field(default=10, description="steps between lines of progress")


class Cluster(Section):
    """The machines that measure and train."""

    workers: PositiveInt = Field(default=1, description="processes that share the work, each with a part of the model")
    min_workers: PositiveInt | None = Field(
        default=None,
        description="start with fewer workers, but so many at least, when resource_timeout is over; null: with all",
    )
    cpus_per_worker: PositiveInt = Field(default=1, description="processor cores reserved for a worker")
    gpus_per_worker: int = Field(default=0, ge=0, le=1, description="1 to train on GPUs: a worker drives one device")
    zero_stage: int = Field(
        default=3, ge=0, le=3, description="what DeepSpeed splits: 1 optimizer, 2 + gradients, 3 + weights"
    )
    resource_timeout: PositiveFloat = Field(
        default=30.0, description="seconds to wait for missing workers", allow_inf_nan=False
    )
    collective_timeout: PositiveInt = Field(
        default=1800, description="seconds a worker waits for the others before the run ends with an error"
    )
    max_failures: NonNegativeInt = Field(
        default=0, description="times that a stage goes on with new workers after some were lost or failed, as in Ray"
    )
    save_interval: NonNegativeFloat = Field(
        default=300.0,
        description="seconds of measuring after which its sums are saved for an interrupted run; 0: never",
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _a_range(self) -> Cluster:
        if self.fewest > self.workers:
            raise ValueError(f"min_workers = {self.min_workers}: is more than workers = {self.workers}; lower it")
        return self

    @property
    def fewest(self) -> int:
        """Workers that the run starts with at least."""
        return self.min_workers or self.workers

    def with_workers(self, workers: int) -> Cluster:
        """The same with exactly so many."""
        return self.model_copy(update={"workers": workers, "min_workers": None})


class Config(Section):
    """Everything that a run depends on."""

    model: Model
    data: Data
    output: str = Field(description="folder or URL (s3://…) of the run: all that it makes goes there", min_length=1)
    select: Select = Select()
    train: Train = Train()
    cluster: Cluster = Cluster()
    seed: NonNegativeInt = Field(default=0, description="of everything random", lt=2**32)

    @model_validator(mode="after")
    def _attention_can_train(self) -> Config:
        attention = self.model.attn_implementation
        if attention in (None, "eager", "sdpa"):
            return self
        given = f"model.attn_implementation = {attention}"
        if not self.cluster.gpus_per_worker:
            raise ValueError(f"{given}: it trains on GPUs alone; set cluster.gpus_per_worker: 1, or take eager or sdpa")
        if attention != "flex_attention" and self.model.dtype == "float32":
            raise ValueError(f"{given}: its kernels take no float32; set model.dtype: bfloat16, or take eager or sdpa")
        return self

    def paths(self) -> dict[str, str]:
        """What lies on a file system, as it is spelled: ``{"data.train": "train.jsonl", "output": "runs/mine", …}``."""
        given = {key: self._at(key) for key in PLACES}
        return {key: place for key, place in given.items() if place is not None and PLACES[key](place)}

    def with_paths(self, paths: Mapping[str, str]) -> Config:
        """The same with other places, by dotted key."""
        tree = self.model_dump()
        for key, path in paths.items():
            section, _, name = key.rpartition(".")
            (tree[section] if section else tree)[name] = path
        return Config.model_validate(tree)

    def resolved(self) -> Config:
        """The same with absolute paths, because workers run in other folders. Names on a hub stay as they are.

        Raises:
            AdapeftError: names a path that no file system takes, such as one that is too long.
        """
        paths = {key: absolute(path) for key, path in self.paths().items()}
        for key, path in paths.items():
            if (reason := impossible(path)) is not None:
                raise AdapeftError(f"{key} = {path}: is not a possible path ({reason}). Give another one.")
        return self.with_paths(paths)

    def _at(self, key: str) -> Any:
        section, _, name = key.rpartition(".")
        return getattr(getattr(self, section) if section else self, name)

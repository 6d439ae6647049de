"""What a run is asked to do: the config's sections and keys, and what two configs have in common."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
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
from pydantic.fields import FieldInfo

from adapeft.choose.budget import Budget
from adapeft.choose.entry import is_name
from adapeft.errors import did_you_mean
from adapeft.tune.rules.options import OPTIONS, parse_options

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
_ANY_GRANULARITY: tuple[Granularity, ...] = ("element", "row", "tensor", "role")
GRANULARITIES: dict[str, tuple[Granularity, ...]] = {
    "full": ("tensor",),
    "bitfit": ("tensor",),
    "lora": ("tensor",),
    "adapter": ("tensor",),
    "adapeft": ("row", "element", "tensor", "role"),
    **dict.fromkeys(OPTIONS, ("element",)),
}
_WITHOUT_VALUES = ("full", "random", "bitfit", "lora", "adapter", *OPTIONS)

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _infinity_in_words(value: float | str) -> float | str:
    return "inf" if value == math.inf else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Reach = Annotated[Literal["auto"] | PositiveFloat, PlainSerializer(_infinity_in_words)]
Limit = Annotated[
    Budget,
    PlainValidator(Budget.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}),
]

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
    probe_learning_rate: PositiveFloat = Field(
        default=5e-5, description="of that training, by Adam", allow_inf_nan=False
    )
    shrinkage: bool = Field(default=True, description="shrink the noisy curvature of single elements towards its mean")
    scope: Literal["global", "tensor"] = Field(
        default="global", description="elements compete in the whole model, or in each tensor for its share"
    )
    solver: Literal["knapsack", "greedy"] = Field(
        default="knapsack", description="how groups are chosen; greedy: by value per parameter, as in the paper"
    )
    joint: bool = Field(
        default=False, description="let adapeft value groups together, with the cross terms of their curvature"
    )
    options: tuple[Literal["row", "tensor", "lora"], ...] = Field(
        default=(),
        description="let adapeft choose for every matrix among rows of it, the whole and LoRA, as [row, tensor, lora]; "
        "none: groups says what is chosen",
    )
    lora_ranks: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8, 16), description="ranks of LoRA among the options", min_length=1
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
        possible = GRANULARITIES.get(self.method, _ANY_GRANULARITY)
        if self.granularity not in possible:
            raise ValueError(f"groups = {self.groups}: {self.method} chooses by {' or '.join(possible)}")
        if self.joint and (self.method != "adapeft" or self.granularity == "element"):
            raise ValueError(
                f"joint = true: {self.method} by {self.granularity} has no cross terms; choose method: adapeft with "
                "groups: row, tensor or role, or leave joint out"
            )
        if self.joint and self.solver != "knapsack":
            raise ValueError("solver = greedy: joint is a greedy choice of its own; leave one of them out")
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
        if self.options and (self.method != "adapeft" or self.granularity != "row"):
            raise ValueError(
                f"options = {list(self.options)}: only adapeft chooses among kinds, and among rows with groups: row; "
                f"here it is {self.method} by {self.granularity}"
            )
        if self.options and self.joint:
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
        if self.method in _WITHOUT_VALUES or self.joint or self.options:
            how = "joint = true" if self.joint else f"options = {list(self.options)}" if self.options else self.method
            raise ValueError(f"{given}: {how} takes a budget of parameters; leave memory_per_device out")

    def _check_parabola(self) -> None:
        if self.method != "adapeft":
            raise ValueError(f"curvature = parabola: {self.method} measures none; leave curvature out")
        if self.granularity not in ("tensor", "role"):
            raise ValueError(
                f"curvature = parabola: 4K + 1 forward passes over half the calibration for K groups are too many by "
                f"{self.granularity}; choose groups: tensor or role"
            )
        if self.joint:
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
        if self.joint:
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
    def granularity(self) -> Granularity:
        """``groups`` with auto decided by the method."""
        return GRANULARITIES.get(self.method, _ANY_GRANULARITY)[0] if self.groups == "auto" else self.groups


class Train(Section):
    """How the chosen parameters are trained."""

    epochs: PositiveFloat = Field(default=3, description="passes over the training data", allow_inf_nan=False)
    max_steps: PositiveInt | None = Field(default=None, description="optimizer steps; if given, epochs is not used")
    learning_rate: PositiveFloat = Field(default=1e-3, description="highest step size of AdamW", allow_inf_nan=False)
    batch_size: PositiveInt = Field(default=32, description="examples an optimizer step sees, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="examples a worker holds at once; null: its share"
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


PAPER = {"groups": "role", "curvature": "parabola", "reach": "inf", "solver": "greedy"}
"""AdaPEFT as Xu and Bu 2025 have it: semantic groups, forward passes only, no limit on the reach, by density."""


class Contender(NamedTuple):
    """A method to compare.

    Spelled ``method``, ``method:groups``, ``adapeft:row+lora`` for a choice of options, or ``adapeft:paper`` for the
    settings of ``PAPER``.
    """

    method: str
    groups: str
    options: tuple[str, ...] = ()
    is_paper: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of ``select`` that make this method what its name says."""
        chosen = {"method": self.method, "groups": self.groups, "options": self.options}
        return {**chosen, **PAPER} if self.is_paper else chosen

    def __str__(self) -> str:
        if self.is_paper:
            return f"{self.method}:paper"
        if self.options:
            return f"{self.method}:{'+'.join(self.options)}"
        return self.method if self.groups == "auto" else f"{self.method}:{self.groups}"

    @classmethod
    def parse(cls, text: object) -> Contender:
        """The contender that a person wrote."""
        method, _, groups = str(text).partition(":")
        methods = get_args(Method)
        if method not in methods:
            raise ValueError(f"{method!r} is no method.{did_you_mean(method, methods)} `adapeft methods` lists them.")
        possible = GRANULARITIES.get(method, _ANY_GRANULARITY)
        if (method, groups) == ("adapeft", "paper"):
            return cls(method, PAPER["groups"], is_paper=True)
        options = tuple(groups.split("+")) if "+" in groups or groups == "lora" else ()
        if options:
            Select(method=method, options=options)  # type: ignore[arg-type]
            return cls(method, "row", options)
        if groups and groups not in possible:
            raise ValueError(f"{method} chooses by {' or '.join(possible)}, not by {groups!r}.")
        return cls(method, groups or "auto")


Rival = Annotated[Contender, PlainValidator(Contender.parse), PlainSerializer(str, return_type=str)]


class Comparison(Section):
    """What ``adapeft compare`` runs: every method at every budget under every seed."""

    methods: tuple[Rival, ...] = Field(
        default=(Contender("adapeft", "auto"), Contender("random", "auto")),
        description="methods, or method:groups such as adapeft:element adapeft:row+tensor+lora, adapeft:paper",
        min_length=1,
    )
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), description="a run each", min_length=1)
    budgets: tuple[Limit, ...] = Field(default=(Budget.parse("0.5%"),), description="a run each", min_length=1)
    learning_rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(),
        description="tried for every method on a held-out part of the training data; none: the config's for all",
    )
    tune_fraction: float = Field(default=0.1, gt=0, lt=1, description="part of the training data held out for that")
    perturb: float = Field(default=0.0, ge=0, lt=1, description="part of the training data that each seed leaves out")
    parallel: PositiveInt = Field(default=1, description="runs at once")


class Trials(Section):
    """Random subsets that ``adapeft validate`` trains briefly to see whether predictions hold."""

    subsets: PositiveInt = Field(default=20, description="random subsets of each size")
    sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.01, 0.1, 0.5),
        description="their sizes, as fractions of what may be chosen",
        min_length=1,
    )
    singles: NonNegativeInt = Field(default=20, description="single tensors that are trained alone besides")
    learning_rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(3e-4, 1e-3), description="constant learning rates of Adam", min_length=1
    )
    steps: tuple[PositiveInt, ...] = Field(
        default=(20, 60), description="optimizer steps after which the held-out loss is measured", min_length=1
    )
    held_out: PositiveInt = Field(default=512, description="examples of data.evaluation that measure the loss")

    @field_validator("steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(steps)))


class Transfer(Section):
    """How ``adapeft transfer`` chooses for another model from a run's statistics."""

    budget: Limit | None = Field(default=None, description="of the target; null: as the run's config spells it")
    groups: Literal["auto", "tensor"] = Field(
        default="auto", description="auto: as the run measured; tensor: whole tensors, which needs no weights"
    )
    inside: Literal["auto", "weight-norm", "gradient"] = Field(
        default="auto",
        description="which rows or elements of a tensor: of largest weight norm, or of largest gradient, by one pass "
        "over the calibration; auto: weight-norm",
    )
    verify: bool = Field(default=False, description="measure the target too, and say how good the transfer was")


class Config(Section):
    """Everything that a run depends on."""

    model: Model
    data: Data
    output: str = Field(description="folder or URL (s3://…) of the run: all that it makes goes there", min_length=1)
    select: Select = Select()
    train: Train = Train()
    cluster: Cluster = Cluster()
    seed: NonNegativeInt = Field(default=0, description="of everything random", lt=2**32)

    def paths(self) -> dict[str, str]:
        """What lies on a file system, as it is spelled: ``{"data.train": "train.jsonl", "output": "runs/mine", …}``."""
        flat = _flatten(self)
        return {key: flat[key] for key, is_place in _PLACES.items() if flat[key] is not None and is_place(flat[key])}

    def with_paths(self, paths: Mapping[str, str]) -> Config:
        """The same with other places, by dotted key."""
        tree = self.model_dump()
        for key, path in paths.items():
            section, _, name = key.rpartition(".")
            (tree[section] if section else tree)[name] = path
        return Config.model_validate(tree)

    def resolved(self) -> Config:
        """The same with absolute paths, because workers run in other folders. Names on a hub stay as they are."""
        return self.with_paths({key: _absolute(path) for key, path in self.paths().items()})


# --- places ----------------------------------------------------------------------------------------------------------


class HubData(NamedTuple):
    """A data set on the hub, spelled ``name:config@split``; the last two may be left out."""

    name: str
    config: str | None
    split: str | None


def hub_data(source: str) -> HubData:
    """The parts of ``glue:cola@train``."""
    head, _, split = source.partition("@")
    name, _, config = head.partition(":")
    return HubData(name, config or None, split or None)


def is_local(source: str) -> bool:
    """Whether a data source is a file or folder rather than the name of a hub data set."""
    return _is_path(source) and (source.lower().endswith(DATA_SUFFIXES) or _exists(source))


def is_in_job_folder(path: str) -> bool:
    """Whether ``path`` is among the files that a Ray job brought along, which Ray unpacks on every machine."""
    return _JOB_FOLDER.match(path) is not None


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _is_path(place: str) -> bool:
    """Whether ``place`` is on a file system rather than the URI of a store."""
    return "://" not in place


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


_JOB_FOLDER = re.compile(r".*/working_dir_files/_ray_pkg_[0-9a-f]+/")
_PLACES: dict[str, Callable[[str], bool]] = {
    "model.name": _exists,
    "data.train": is_local,
    "data.evaluation": is_local,
    "output": _is_path,
    "select.statistics": _is_path,
    "train.subset": lambda place: _is_path(place) and not is_name(place),
}


# --- keys ------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "select": Select,
    "train": Train,
    "cluster": Cluster,
}


KEYS: dict[str, FieldInfo] = {
    key: field
    for name, top in Config.model_fields.items()
    for key, field in (
        {f"{name}.{word}": field for word, field in SECTIONS[name].model_fields.items()}
        if name in SECTIONS
        else {name: top}
    ).items()
}

# What the statistics of a run depend on: runs that agree on these can share them, whatever their budget,
# reach, training or machines.
_MEASURED = (
    *("model.name", "model.task", "model.revision", "model.dtype", "model.matmul_precision"),
    *("data.train", "data.text", "data.text_pair", "data.label", "data.max_length"),
    *(
        "select.method",
        "select.shrinkage",
        "select.joint",
        "select.options",
        "select.lora_ranks",
        "select.groups",
        "select.calibration",
        "select.batch_size",
        "select.direction",
        "select.curvature",
        "select.probe_steps",
        "select.probe_points",
        "select.probe_learning_rate",
        "select.warmup_steps",
    ),
    *("select.always_train", "select.include", "select.exclude"),
    "seed",
)


# --- comparing -------------------------------------------------------------------------------------------------------


def measurement_key(config: Config) -> dict[str, Any]:
    """Everything that measuring depends on: equal keys mean that statistics can be used again."""
    flat = comparable(config)
    key = {name: flat[name] for name in _MEASURED}
    key["select.groups"] = config.select.granularity
    return key


def differences(a: Config, b: Config) -> list[str]:
    """Lines such as ``select.budget: 0.5% here, 1% there``, for ``a`` here and ``b`` there."""
    here, there = comparable(a), comparable(b)
    return [f"{key}: {as_yaml(here[key])} here, {as_yaml(there[key])} there" for key in KEYS if here[key] != there[key]]


def comparable(config: Config) -> dict[str, Any]:
    """By dotted path, with the files of a Ray job as they were spelled: each attempt unpacks them in another folder."""
    flat = _flatten(config)
    return {key: _JOB_FOLDER.sub("", value) if key in _PLACES and value else value for key, value in flat.items()}


def _flatten(config: Config) -> dict[str, Any]:
    """Plain values by dotted path."""
    tree = config.model_dump(mode="json")
    return {key: tree[key.split(".")[0]][key.split(".")[1]] if "." in key else tree[key] for key in KEYS}


def plain(value: object) -> object:
    """``value`` as YAML can hold it."""
    return str(value) if isinstance(value, Budget) else list(value) if isinstance(value, tuple) else value


def as_yaml(value: object) -> str:
    """``value`` on one line, as a person would write it in a config."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()

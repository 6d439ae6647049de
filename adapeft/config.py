"""What a run is asked to do: one YAML file, validated whole before anything heavy is imported."""

from __future__ import annotations

import difflib
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    WithJsonSchema,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.scanner import ScannerError

from adapeft.choose.budget import Budget
from adapeft.errors import AdapeftError, did_you_mean

Task = Literal["sequence-classification", "causal-lm"]
Metric = Literal["auto", "accuracy", "matthews", "f1", "accuracy_f1", "pearson_spearman", "loss", "perplexity"]
Method = Literal["adapeft", "sam", "random"]
Granularity = Literal["tensor", "row", "element"]

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


class Section(BaseModel):
    """Part of a config: read-only, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """The pretrained transformer."""

    name: str = Field(description="folder or hub name of the pretrained model", min_length=1)
    task: Task = Field(description="what the model is trained to do")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of the frozen weights")
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
        default="auto", description="what is chosen together; auto: row for adapeft, element for sam and random"
    )
    budget: Limit = Field(
        default=Budget.parse("0.5%"),
        description="most that is trained: a fraction (0.5%, 0.005) or a count (100000, 100k, 1.5M)",
    )
    calibration: int = Field(
        default=512, ge=2, description="examples to measure on, half for the direction, half for its gain"
    )
    batch_size: PositiveInt = Field(default=16, description="examples in a calibration batch, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="examples a worker holds at once; null: its share"
    )
    direction: Literal["adam", "gradient"] = Field(default="adam", description="where training would step")
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
    shrinkage: bool = Field(default=True, description="shrink the noisy curvature of single elements towards its mean")
    statistics: str | None = Field(default=None, description="folder of another run whose measurements are used again")

    @property
    def granularity(self) -> Granularity:
        """``groups`` with auto decided by the method."""
        if self.groups != "auto":
            return self.groups
        return "row" if self.method == "adapeft" else "element"


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
    subset: str | None = Field(default=None, description="saved subset.safetensors to train instead of choosing")
    logging_steps: PositiveInt = Field(default=10, description="steps between lines of progress")


class Cluster(Section):
    """The machines that measure and train."""

    workers: PositiveInt = Field(default=1, description="processes that share the work, each with a part of the model")
    cpus_per_worker: PositiveInt = Field(default=1, description="processor cores reserved for a worker")
    gpus_per_worker: int = Field(default=0, ge=0, le=1, description="1 to train on GPUs: a worker drives one device")
    zero_stage: int = Field(
        default=3, ge=0, le=3, description="what DeepSpeed splits: 1 optimizer, 2 + gradients, 3 + weights"
    )
    resource_timeout: PositiveFloat = Field(
        default=30.0, description="seconds to wait for missing workers", allow_inf_nan=False
    )
    storage_path: str | None = Field(
        default=None, description="folder or URI that all machines reach, for checkpoints; null: the output folder"
    )


class Config(Section):
    """Everything that a run depends on."""

    model: Model
    data: Data
    output: str = Field(description="folder of the run: all that it makes goes there", min_length=1)
    select: Select = Select()
    train: Train = Train()
    cluster: Cluster = Cluster()
    seed: NonNegativeInt = Field(default=0, description="of everything random", lt=2**32)

    def resolved(self) -> Config:
        """The same with absolute paths, because workers run in other folders. Names on a hub stay as they are."""
        tree = self.model_dump()
        for key, is_place in _PLACES.items():
            section, _, name = key.rpartition(".")
            branch = tree[section] if section else tree
            if branch[name] is not None and is_place(branch[name]):
                branch[name] = _absolute(branch[name])
        return Config.model_validate(tree)


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


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _is_path(place: str) -> bool:
    """Whether ``place`` is on a file system rather than the URI of a store."""
    return "://" not in place


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


_PLACES: dict[str, Callable[[str], bool]] = {
    "model.name": _exists,
    "data.train": is_local,
    "data.evaluation": is_local,
    "output": _is_path,
    "select.statistics": _is_path,
    "train.subset": _is_path,
    "cluster.storage_path": _is_path,
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
    *("model.name", "model.task", "model.revision", "model.dtype"),
    *("data.train", "data.text", "data.text_pair", "data.label", "data.max_length"),
    *(
        "select.method",
        "select.shrinkage",
        "select.groups",
        "select.calibration",
        "select.batch_size",
        "select.direction",
        "select.warmup_steps",
    ),
    *("select.always_train", "select.include", "select.exclude"),
    "seed",
)


def _last_word(key: str) -> str:
    return key.rpartition(".")[2]


# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the YAML file at ``path``, applies ``key=value`` overrides, checks all of it and makes its paths absolute.

    A key is dotted (``select.budget=1%``), or its last word alone where that is unambiguous (``budget=1%``).
    Raises one ``AdapeftError`` that lists every problem.
    """
    tree = _read(Path(path))
    problems = _override(tree, overrides)
    try:
        given = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise AdapeftError(f"{path}: {error.full_key}: {reason}; set the variable or mend the reference") from error
    assert isinstance(given, dict)
    return parse_config(given, source=str(path), problems=problems).resolved()


def parse_config(tree: Mapping[Any, Any], source: str = "config", problems: Sequence[str] = ()) -> Config:
    """The config that nested dictionaries spell; ``problems`` are those already found on the way here."""
    tree = {key: value for key, value in tree.items() if not _is_missing(value)}
    # A section that is left out or left empty counts as empty, so that the error names the keys that it lacks.
    tree |= {name: {} for name in SECTIONS if tree.get(name) is None}
    for name, section in tree.items():
        if isinstance(section, Mapping):
            tree[name] = {key: value for key, value in section.items() if not _is_missing(value)}
    problems = list(problems)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += _phrase(error.errors(), tree)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise AdapeftError(f"{source} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def parse_select(options: Mapping[str, Any]) -> Select:
    """The ``select`` section alone, for the library, which has no config."""
    try:
        return Select.model_validate(options)
    except ValidationError as error:
        details = [{**detail, "loc": ("select", *detail["loc"])} for detail in error.errors()]
        raise AdapeftError("\n".join(_phrase(details, {"select": options}))) from None  # type: ignore[arg-type]


def _is_missing(value: object) -> bool:
    """OmegaConf's mark for what the reader of a config has to fill in; ``defaults_yaml`` writes it."""
    return isinstance(value, str) and value == "???"


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        here = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise AdapeftError(
            f"config = {path}: no such file.{did_you_mean(path.name, here)} `adapeft config` prints one to start from."
        )
    try:
        # Not yaml.safe_load: it reads 1e-3 as text and lets a key that is given twice pass.
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        hint = "\nText that begins with * or % has to be in quotes." if isinstance(error, ScannerError) else ""
        raise AdapeftError(f"{path}: cannot be read: {error}{hint}") from error
    if not isinstance(tree, DictConfig):
        raise AdapeftError(f"{path}: should be sections and keys such as `seed: 0`, not a list.")
    return tree


def _override(tree: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Writes the overrides into ``tree``; returns the problems of those that make no sense."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            if not equals:
                raise AdapeftError(f"{override}: an override is written key=value")
            OmegaConf.update(tree, _full_key(key.strip(), text), _value(text), force_add=True)
        except AdapeftError as error:
            problems.append(str(error))
    return problems


def _full_key(key: str, text: str) -> str:
    """The dotted path of ``key``, which may be a last word alone."""
    if "." in key or key in KEYS:
        return key
    candidates = [known for known in KEYS if _last_word(known) == key]
    if len(candidates) == 1 and key not in SECTIONS:
        return candidates[0]
    if candidates:
        spellings = " or ".join(f"{candidate}={text}" for candidate in candidates)
        raise AdapeftError(f"{key}={text}: {key!r} has more than one meaning; write {spellings}")
    if key in SECTIONS:
        raise AdapeftError(f"{key}={text}: {key!r} is a section; write {key}.KEY=VALUE")
    raise AdapeftError(f"{key}: unknown key.{_suggestion(key)}")


def _value(text: str) -> object:
    """What YAML makes of ``text``, and the text itself where YAML refuses it, as it does ``*embeddings*``."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError:
        return text


# --- problems --------------------------------------------------------------------------------------------------------

# What pydantic says in the words of Python, in the words of YAML.
_WANTED = {
    "string_type": "text, in quotes if YAML takes it for something else",
    "string_too_short": "not empty",
    "tuple_type": "a list",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "finite",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


def _phrase(details: Sequence[ErrorDetails], tree: Mapping[Any, Any]) -> list[str]:
    """A line for each key that is wrong, such as ``train.epochs = -1: should be greater than 0 (passes over …)``."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        # pydantic reports each alternative of a union by itself, under a path that is longer than the key's.
        found.setdefault(".".join(map(str, detail["loc"][:2])), []).append(detail)
    return [_line(key, complaints, tree) for key, complaints in found.items()]


def _line(key: str, details: Sequence[ErrorDetails], tree: Mapping[Any, Any]) -> str:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key.{_suggestion(key)}"
    if key not in KEYS and key not in SECTIONS:
        return f"{key}: {details[0]['msg']}"
    if kind == "missing":
        return f"{key}: required ({KEYS[key].description})"
    section, _, name = key.partition(".")
    value = _as_yaml(tree[section][name] if name else tree[section])
    if key in SECTIONS:
        return f"{key} = {value}: is a section; write its keys below it, indented"
    if kind == "value_error":
        # An AdapeftError has named field and value already, but not the section.
        return f"{key} = {value}: {str(details[0]['ctx']['error']).partition(': ')[2]}"
    alternatives = dict.fromkeys(_complaint(detail) for detail in details)
    guess = did_you_mean(value, re.findall(r"'([^']+)'", " ".join(alternatives)))
    return f"{key} = {value}: should be {' or '.join(alternatives)} ({KEYS[key].description}).{guess}"


def _complaint(detail: ErrorDetails) -> str:
    """What the value should be, in the words of someone who writes YAML."""
    if detail["type"] in _WANTED:
        return _WANTED[detail["type"]]
    return detail["msg"].removeprefix("Input should be ")


def _suggestion(key: str) -> str:
    """Keys of the same last word in other sections, else those with a similar one."""
    word = _last_word(key)
    names = [*KEYS, *SECTIONS]
    words = {_last_word(name) for name in names}
    close = [word] if word in words else difflib.get_close_matches(word, sorted(words), n=2)
    matches = [repr(name) for name in names if _last_word(name) in close]
    return f" Did you mean {' or '.join(matches)}?" if matches else " `adapeft config` lists all keys."


# --- writing ---------------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as ``load_config`` reads it."""
    # OmegaConf quotes the text that it would read as a number, such as the revision 12e45; yaml.safe_dump does not.
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def defaults_yaml() -> str:
    """A config to start from: each key under a line that explains it, with its default or ``???`` where it has none."""
    blocks = []
    for name, field in Config.model_fields.items():
        if name in SECTIONS:
            keys = "\n".join(_documented(key, inner) for key, inner in SECTIONS[name].model_fields.items())
            blocks.append(f"# {SECTIONS[name].__doc__}\n{name}:\n{textwrap.indent(keys, '  ')}")
        else:
            blocks.append(_documented(name, field))
    return "\n\n".join(blocks) + "\n"


def _documented(key: str, field: FieldInfo) -> str:
    choices = f" ({' | '.join(get_args(field.annotation))})" if get_origin(field.annotation) is Literal else ""
    comment = textwrap.fill(f"{field.description}{choices}", 116, initial_indent="# ", subsequent_indent="# ")
    return f"{comment}\n{key}: {'???' if field.is_required() else _as_yaml(_plain(field.default))}"


def json_schema() -> dict[str, Any]:
    """JSON schema of the config, for editors that complete and check YAML."""
    schema = Config.model_json_schema()
    # pydantic would spell out the fields of the default budget.
    schema["$defs"]["Select"]["properties"]["budget"]["default"] = _plain(KEYS["select.budget"].default)
    return schema


# --- comparing -------------------------------------------------------------------------------------------------------


def measurement_key(config: Config) -> dict[str, Any]:
    """Everything that measuring depends on: equal keys mean that statistics can be used again."""
    flat = _flatten(config)
    key = {name: flat[name] for name in _MEASURED}
    key["select.groups"] = config.select.granularity
    return key


def differences(a: Config, b: Config) -> list[str]:
    """Lines such as ``select.budget: 0.5% here, 1% there``, for ``a`` here and ``b`` there."""
    here, there = _flatten(a), _flatten(b)
    return [
        f"{key}: {_as_yaml(here[key])} here, {_as_yaml(there[key])} there" for key in KEYS if here[key] != there[key]
    ]


def _flatten(config: Config) -> dict[str, Any]:
    """Plain values by dotted path."""
    tree = config.model_dump(mode="json")
    return {key: tree[key.split(".")[0]][key.split(".")[1]] if "." in key else tree[key] for key in KEYS}


def _plain(value: object) -> object:
    """``value`` as YAML can hold it."""
    return str(value) if isinstance(value, Budget) else list(value) if isinstance(value, tuple) else value


def _as_yaml(value: object) -> str:
    """``value`` on one line, as a person would write it in a config."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()

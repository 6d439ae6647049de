"""Settings of the commands ``compare``, ``validate`` and ``transfer``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PlainSerializer, PlainValidator, PositiveInt, PrivateAttr, field_validator

from adapeft.config.config import Config
from adapeft.config.load import parse_config, parse_section, parse_select, read_tree
from adapeft.errors import AdapeftError, ConflictError, did_you_mean
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.options import OPTIONS, flat, says_nothing
from adapeft.sections.budget import DEFAULT_BUDGET
from adapeft.sections.section import Limit, Section
from adapeft.sections.select import Granularity

PAPER: dict[str, Any] = {
    "groups": "role",
    "curvature": "parabola",
    "reach": "inf",
    "solver": "greedy",
    "probe_steps": 20,
}
"""AdaPEFT as published by Xu and Bu 2025: semantic groups, fits by forward passes, no limit on the reach, influence
accumulated over a short probe, greedy choice by density."""


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
    def granularity(self) -> Granularity:
        return parse_select(self.settings).granularity

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of ``select`` that configure this method."""
        chosen: dict[str, Any] = {"method": self.method, "groups": self.groups}
        if issubclass(OPTIONS[self.method], AdaPEFTOptions):
            chosen |= {"options": self.options}
        return {**chosen, **PAPER} if self.is_paper else chosen

    def __str__(self) -> str:
        if self.is_paper:
            return f"{self.method}:paper"
        if self.options:
            return f"{self.method}:{'+'.join(self.options)}"
        return self.method if self.groups == "auto" else f"{self.method}:{self.groups}"

    @classmethod
    def parse(cls, text: object) -> Contender:
        """Parse a contender such as ``adapeft:row``.

        Raises:
            ValueError: unknown method, or groups that it cannot choose by.
        """
        method, _, groups = str(text).partition(":")
        if method not in OPTIONS:
            raise ValueError(f"{method!r} is not a method.{did_you_mean(method, OPTIONS)} See `adapeft methods`.")
        possible = OPTIONS[method].granularities
        if (method, groups) == ("adapeft", "paper"):
            return cls(method, PAPER["groups"], is_paper=True)
        options = tuple(groups.split("+")) if "+" in groups or groups == "lora" else ()
        if options:
            contender = cls(method, "row", options)
            parse_select({**contender.settings, "options": options})
            return contender
        if groups and groups not in possible:
            raise ValueError(f"{method} chooses by {' or '.join(possible)}, not by {groups!r}.")
        return cls(method, groups or "auto")


Rival = Annotated[Contender, PlainValidator(Contender.parse), PlainSerializer(str, return_type=str)]


_REFERENCES = ("lora", "full", "random")


class Comparison(Section):
    """Settings of ``adapeft compare``, which runs every method at every budget with every seed."""

    methods: tuple[Rival, ...] = Field(
        default=(Contender("adapeft", "auto"), Contender("random", "auto")),
        description="methods, or method:groups such as adapeft:element, adapeft:row+tensor+lora, adapeft:paper",
        min_length=1,
    )
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), description="one run per seed", min_length=1)
    budgets: tuple[Limit, ...] = Field(default=(DEFAULT_BUDGET,), description="one run per budget", min_length=1)
    learning_rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(),
        description="learning rates tried for every method on a held-out part of the training data; none: the config's "
        "for all methods",
    )
    sweep: Literal["climb", "asha"] = Field(
        default="climb",
        description="how learning_rates are tried; climb: by whole runs, from the middle one towards better scores; "
        "asha: all of them, of which those behind at a ninth or a third of the steps are stopped; needs Ray",
    )
    tune_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="fraction of the training data held out to tune learning rates"
    )
    perturb: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of the training data that each seed leaves out"
    )
    parallel: PositiveInt | None = Field(
        default=None,
        description="most runs at once; null: one, or, with Ray, as many as there is room for",
    )
    reference: Rival | None = Field(
        default=None,
        description="method to whose last score the steps of the others are counted; null: lora, full or random, the "
        "first that is compared",
    )

    _keys: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def referred(self) -> Contender | None:
        """Method that ``reference`` means; None if it is not given and none of the usual ones is compared."""
        usual = (one for name in _REFERENCES for one in self.methods if one.method == name)
        return self.reference or next(usual, None)

    @property
    def keys(self) -> dict[str, Any]:
        """Keys of ``select`` that the shared config cannot hold, because no method has all of them."""
        return self._keys

    def with_keys(self, keys: dict[str, Any]) -> Comparison:
        """Return a copy with these ``keys``."""
        found = self.model_copy()
        found._keys = keys
        return found


def load_comparison(path: Path, overrides: Sequence[str]) -> tuple[Comparison, Config]:
    """Return the comparison and the config that all its runs share.

    Each key of ``select`` has to belong to at least one of the methods. If no method has all of them, the config is
    that of the first method that is valid with the keys it has, and the comparison keeps all keys.

    Raises:
        AdapeftError: the comparison or the config is invalid. If it is valid with no method, the error is that of the
            config as written.
    """
    comparison, others = parse_section(Comparison, overrides)
    tree, problems = read_tree(path, others)

    def parse(select: object) -> Config:
        return parse_config({**tree, "select": select}, str(path), problems).resolved()

    try:
        return comparison, parse(tree.get("select"))
    except ConflictError:
        given = flat(tree.get("select") or {})
        config, unread = None, {key: value for key, value in given.items() if not says_nothing(key, value)}
        for contender in comparison.methods:
            mine = {key: given[key] for key in given.keys() & OPTIONS[contender.method].model_fields.keys()}
            with suppress(ConflictError):
                found = parse({**mine, **contender.settings})
                config, unread = config or found, {key: unread[key] for key in unread.keys() - mine.keys()}
        if config is None or unread:
            raise
        return comparison.with_keys(given), config


class Trials(Section):
    """Random subsets that ``adapeft validate`` trains briefly to check the predictions."""

    subsets: PositiveInt = Field(default=20, description="random subsets of each size")
    sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.01, 0.1, 0.5),
        description="sizes of the random subsets, as fractions of the candidate parameters",
        min_length=1,
    )
    singles: NonNegativeInt = Field(default=20, description="additional trials that each train one tensor alone")
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

    def check(self, config: Config, num_parameters: int = 0) -> None:
        """Check that the config's groups, measurement, dtype and data are supported.

        Args:
            config: config of the run.
            num_parameters: size of the model, on which ``select.measure: auto`` depends; 0 before it is known.

        Raises:
            AdapeftError: the groups are roles, the measurement is low-rank, the weights are not float32, or the
                data are streamed.
        """
        if config.select.granularity == "role":
            raise AdapeftError(
                "select.groups = role: validate draws groups within single tensors. "
                "Set select.groups to tensor, row or element."
            )
        if config.select.window_rank(num_parameters):
            size = f", for a model of {num_parameters:,} parameters" if num_parameters else ""
            raise AdapeftError(
                f"select.measure = low-rank{size}: validate compares estimators that need the gradients of single "
                "elements. Set select.measure: exact if the memory suffices (adapeft estimate)."
            )
        if config.model.dtype != "float32":
            raise AdapeftError(
                f"model.dtype = {config.model.dtype}: the small steps of validate would be lost to rounding, because "
                "it keeps no float32 copies as DeepSpeed does. Set model.dtype: float32, and "
                "model.matmul_precision: medium if speed matters."
            )
        if config.data.is_streamed:
            raise AdapeftError(
                "data.streaming = true: validate trains on batches of the whole data, again and again. Set "
                "data.streaming: false, and name a part of the data in data.train."
            )


class Transfer(Section):
    """Settings of ``adapeft transfer``, which chooses parameters of another model from a run's statistics."""

    budget: Limit | None = Field(default=None, description="budget of the target; null: that of the run's config")
    groups: Literal["auto", "tensor"] = Field(
        default="auto",
        description="auto: the groups that the run measured; tensor: whole tensors, which needs no weights",
    )
    inside: Literal["auto", "weight-norm", "gradient", "slope"] = Field(
        default="auto",
        description="how rows or elements of a tensor are chosen: weight-norm: of largest weight norm; gradient: of "
        "largest gradient, by one pass over the calibration examples; slope: by the target's own slopes, by one pass "
        "too, which also divide the budget among tensors; auto: weight-norm",
    )
    verify: bool = Field(default=False, description="also measure the target and report how good the transfer is")

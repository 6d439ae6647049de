"""The keys of the config's ``select`` section that all methods have."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from adapeft.sections.budget import DEFAULT_BUDGET
from adapeft.sections.section import Bytes, Harmless, Limit, Patterns, Reach, Section
from adapeft.servers import MAX_RANK

Granularity = Literal["tensor", "row", "element", "role"]
OnQuantized = Literal["candidate", "left out", "refused"]


class Select(Section):
    """Which parameters to train, and how many.

    Every method has a subclass, which names it in ``method`` and adds its own options.

    Attributes:
        granularities: granularities that the method supports, its default first.
        predicts_loss: whether the value of a choice is the loss decrease that it promises.
    """

    granularities: ClassVar[tuple[Granularity, ...]] = ("element", "row", "tensor", "role")
    predicts_loss: ClassVar[bool] = False

    method: str = Field(description="method that chooses parameters")
    groups: Literal["auto", Granularity] = Field(
        default="auto",
        description="parameters that are chosen together; auto: the method's default, for adapeft element, or row with "
        "servable or options; on language models LoRA (as method: lora) if the budget holds at least a 25th of rank 1 "
        "on all linear layers; role: the tensors of one name in all layers",
    )
    budget: Harmless[Limit] = Field(
        default=DEFAULT_BUDGET,
        description="limit on trained parameters: a fraction (0.5%, 0.005), a count (100000, 100k, 1.5M), or auto: for "
        "adapeft, as few as promise 99% of the loss decrease of 0.5%, or 0.5% where a draw fills them up",
    )
    memory_per_device: Harmless[Bytes | None] = Field(
        default=None, description="limit on the memory of training per device, such as 24GiB; replaces budget"
    )
    calibration: int = Field(
        default=512, ge=2, description="examples to measure on: half for the direction, half for slope and curvature"
    )
    batch_size: PositiveInt = Field(default=16, description="calibration examples per batch, over all workers")
    micro_batch_size: Harmless[PositiveInt | None] = Field(
        default=None, description="examples per forward pass of a worker; null: its share of the batch"
    )
    reach: Harmless[Reach] = Field(
        default="auto",
        description="how far training moves along the direction; inf: to the minimum of the predicted loss",
    )
    always_train: Patterns = Field(
        default=("auto",),
        description="patterns of parameters that are trained outside the budget; auto: the new head, if any",
    )
    include: Patterns = Field(default=(), description="patterns of parameters that may be chosen; none: all parameters")
    exclude: Patterns = Field(default=(), description="patterns of parameters that may not be chosen")
    servable: Harmless[bool] = Field(
        default=False,
        description="choose only what `adapeft export --servable` writes for vLLM and SGLang: rows and LoRA of the "
        "linear layers that they know, without a new head",
    )
    warmup_steps: Literal["auto"] | NonNegativeInt = Field(
        default="auto",
        description="steps that train only always_train before measuring; auto: the method's default",
    )
    statistics: Harmless[str | None] = Field(
        default=None, description="folder of another run whose statistics are reused"
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
        """Check that keys are compatible.

        Raises:
            ValueError: keys that cannot be used together.
        """
        if self.servable and (what := self.unservable) is not None:
            raise ValueError(
                f"servable = true: {what}, but vLLM and SGLang load only rows and LoRA, of rank {MAX_RANK} at most; "
                "set groups: row, options: [row, lora] or method: lora, or leave servable out"
            )
        if self.budget.is_auto and not self.predicts_loss:
            raise ValueError(
                f"budget = auto: {self.method} predicts no loss decrease, so it does not know how many parameters "
                "suffice; write a fraction such as 0.5% or a number, or set method: adapeft"
            )
        if self.memory_per_device is None:
            return
        given = f"memory_per_device = {self.memory_per_device}"
        if self.budget != type(self).model_fields["budget"].default:
            raise ValueError(f"{given}: budget = {self.budget} is another limit; leave one of them out")
        if (how := self.counts_parameters) is not None:
            raise ValueError(f"{given}: {how} needs a budget of parameters; leave memory_per_device out")

    @property
    def granularity(self) -> Granularity:
        """``groups``, with auto replaced by the method's default."""
        return self.granularities[0] if self.groups == "auto" else self.groups

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of parts to choose among: the granularity, or several options."""
        return (self.granularity,)

    @property
    def depends_on_reach(self) -> bool:
        """Whether the choice depends on how far the planned training moves, and so on its learning rate."""
        return False

    @property
    def fills(self) -> bool:
        """Whether what a choice leaves of the budget is drawn."""
        return False

    @property
    def draws_for_noise(self) -> bool:
        """Whether a random draw replaces a choice whose slopes are noise."""
        return False

    @property
    def counts_parameters(self) -> str | None:
        """Name, for messages, of the setting that needs a budget of parameters; None if it may be bytes."""
        return self.method

    @property
    def unservable(self) -> str | None:
        """What the choice trains that vLLM and SGLang do not load, for messages; None if they load it."""
        return None if self.granularity == "row" else f"{self.method} trains by {self.granularity}"

    @property
    def displacing(self) -> str | None:
        """Key that makes measuring move the candidates' weights temporarily; None if none does."""
        return None

    @property
    def quantized_matrices(self) -> OnQuantized:
        """What quantized matrices are to this choice; it is refused if it would train them whole."""
        return "refused" if self.granularity in ("tensor", "role") else "left out"

    def window_rank(self, num_parameters: int, *, is_quantized: bool = False) -> int | None:
        """Return the rank of the windows through which a model is measured; None: exactly.

        Args:
            num_parameters: size of the model.
            is_quantized: whether some of its candidates are.
        """
        return None

    def measured(self, num_parameters: int, *, is_quantized: bool = False) -> dict[str, Any]:
        """Return the resolved values of keys such as ``groups: auto``, for the key of a measurement.

        The arguments are those of ``window_rank``.
        """
        candidates = {"servable": True} if self.servable else {}
        return {"groups": self.granularity, **candidates}

    def own(self) -> dict[str, Any]:
        """Return the method's own options as plain values."""
        return self.model_dump(mode="json", exclude=set(Select.model_fields))

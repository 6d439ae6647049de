"""The config's ``train`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from adapeft.sections.section import Harmless, LearningRate, Options, Section, as_list

# Those of transformers whose learning rates are known beforehand. Not from its SchedulerType, which imports torch.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
_UNPLANNED = ("greedy", "reduce_lr_on_plateau")


class Train(Section):
    """How the chosen parameters are trained."""

    # Bounded, because the learning rates of all steps are computed before the first one.
    epochs: Harmless[PositiveFloat] = Field(
        default=3, le=100_000, description="passes over the training data", allow_inf_nan=False
    )
    max_steps: Harmless[PositiveInt | None] = Field(
        default=None, le=10_000_000, description="number of optimizer steps; replaces epochs"
    )
    learning_rate: Harmless[Literal["auto"] | LearningRate] = Field(
        default="auto",
        description="peak learning rate of AdamW; auto: the best of short trainings on a part of data.train",
    )
    head_learning_rate: Harmless[Literal["auto"] | LearningRate | None] = Field(
        default="auto",
        description="peak learning rate of a new head; auto: from the size of its inputs; null: learning_rate",
    )
    batch_size: Harmless[PositiveInt] = Field(default=32, description="examples per optimizer step, over all workers")
    micro_batch_size: Harmless[PositiveInt | None] = Field(
        default=None, description="examples per forward pass of a worker; null: its share of the batch"
    )
    train_sampling_strategy: Harmless[Literal["random", "group_by_length"]] = Field(
        default="random", description="group_by_length: examples of similar length in each batch, for less padding"
    )
    weight_decay: Harmless[NonNegativeFloat] = Field(
        default=0.01, description="decoupled weight decay", allow_inf_nan=False
    )
    warmup_ratio: Harmless[float] = Field(
        default=0.1, ge=0, lt=1, description="fraction of the steps over which the learning rate rises; 0 for constant"
    )
    lr_scheduler_type: Harmless[Schedule] = Field(
        default="linear",
        description="schedule of the learning rate, by its name in transformers; constant has no warmup",
    )
    lr_scheduler_kwargs: Harmless[Options] = Field(
        default={},
        description="options of the schedule, as in the Trainer: {num_decay_steps: 100}, {min_lr_rate: 0.1}",
        validate_default=True,
    )
    max_grad_norm: Harmless[NonNegativeFloat | None] = Field(
        default=1.0, description="gradients are clipped to this norm; null or 0: off"
    )
    max_skipped_steps: Harmless[NonNegativeInt] = Field(
        default=0,
        description="steps that may be skipped because their loss or gradient is not finite; one more ends the run",
    )
    eval_steps: Harmless[PositiveInt | None] = Field(
        default=None, description="steps between evaluations; null: once per epoch, or every 500 with data.streaming"
    )
    early_stopping_patience: Harmless[PositiveInt | None] = Field(
        default=None,
        description="evaluations in a row without a better data.metric that end the training; null: train to the end",
    )
    save_steps: Harmless[PositiveInt | None] = Field(
        default=None,
        description="steps between resumable checkpoints; null: once per epoch, or every 500 with data.streaming",
    )
    subset: Harmless[str | None] = Field(
        default=None,
        description="saved subset to train instead of choosing: file, URL, or name in $ADAPEFT_STORE",
    )
    logging_steps: Harmless[PositiveInt] = Field(default=10, description="steps between progress lines")
    report_to: Harmless[Annotated[tuple[Tracker, ...], BeforeValidator(as_list)]] = Field(
        default=("tensorboard",),
        description="trackers of config, losses, scores and choice; their environment variables apply; []: none",
    )

    @field_validator("lr_scheduler_type", mode="before")
    @classmethod
    def _is_planned(cls, value: object) -> object:
        if value in _UNPLANNED:
            raise ValueError(
                f"lr_scheduler_type = {value}: its learning rates depend on the training, but the choice needs the sum "
                "of all of them beforehand. Give another schedule, such as cosine or warmup_stable_decay."
            )
        return value

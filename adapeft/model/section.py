"""The config's ``model`` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from adapeft.sections.paths import exists
from adapeft.sections.section import Harmless, Section
from adapeft.tasks.registry import TaskName


class Model(Section):
    """The pretrained transformer."""

    name: str = Field(description="folder or hub name of the pretrained model", min_length=1)
    task: TaskName = Field(description="task that the model is trained for")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="dtype of the frozen weights")
    # Harmless, because an entry for each would make the statistics of older versions look different.
    quantization: Harmless[Literal["none", "int8", "nf4"] | None] = Field(
        default=None,
        description="type to which bitsandbytes quantizes the linear layers of the blocks while they are loaded; nf4: "
        "with double quantization, computed in dtype (QLoRA: bfloat16); embeddings, norms and heads stay as they are; "
        "null: as the checkpoint is; none: not quantized, also an error if the checkpoint is",
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        default="highest",
        description="precision of float32 matrix products, as in torch.set_float32_matmul_precision: high is TF32 on "
        "NVIDIA GPUs, medium is bfloat16 on hardware that supports it",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(
            default=None,
            description="attention implementation; null: the default of transformers; on CPUs eager is faster for "
            "short texts",
        )
    )
    trust_remote_code: Harmless[bool] = Field(default=False, description="run model code from the hub")
    gradient_checkpointing: Harmless[bool] = Field(
        default=False, description="recompute activations: less memory, more time"
    )

    @model_validator(mode="after")
    def _a_revision_of_a_hub_model(self) -> Model:
        if self.revision is not None and exists(self.name):  # transformers would ignore it
            raise ValueError(
                f"revision = {self.revision}: name = {self.name} is a folder, which has no revisions; leave revision "
                "out, or give the name of a hub model"
            )
        return self

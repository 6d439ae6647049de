"""What ``select.groups: auto`` stands for once the model is known."""

from __future__ import annotations

from transformers import PreTrainedModel

from adapeft.config.config import Config
from adapeft.measure.groups import groups_of
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.lora.method import least_lora
from adapeft.methods.lora.options import LoRAOptions
from adapeft.sections.select import Select
from adapeft.tasks.registry import TASKS

_ON_ALL_LAYERS = (
    "LoRA on all linear layers, as it has lower losses on language models whose budget holds it; "
    "select.groups=element chooses single elements"
)
_ON_CHOSEN_LAYERS = (
    "LoRA on chosen layers, as it has lower losses on language models than rows; select.groups=row chooses rows"
)


def for_model(config: Config, structure: PreTrainedModel) -> tuple[Config, str]:
    """Return the config with what ``select.groups: auto`` stands for, in words too: LoRA on many language models.

    Where the budget holds LoRA on all linear layers, it is method ``lora``: with as many parameters it has lower losses
    than single elements, chosen or drawn, by 0.06 on nl2bash and 0.15 on WikiText-2 (tests/benchmarks/results). It
    needs no measurement, so this is decided before any. Below, what has to be servable is LoRA on chosen layers, which
    is ahead of rows by 0.32 on nl2bash.

    Args:
        config: config of a run.
        structure: the model that it names, with or without weights.

    Returns:
        The config, and what ``auto`` stands for if that is LoRA; else the same config and an empty text.
    """
    select = config.select
    is_open = isinstance(select, AdaPEFTOptions) and select.leaves_kind_open and config.train.subset is None
    if not (is_open and TASKS[config.model.task].predicts_tokens):
        return config, ""
    groups = groups_of(structure, select)
    least = least_lora(groups)
    if least is None:
        return config, ""
    if least <= select.budget.count(groups.num_total):
        shared = {name: getattr(select, name) for name in Select.model_fields if name not in ("method", "groups")}
        return config.model_copy(update={"select": LoRAOptions(method="lora", **shared)}), _ON_ALL_LAYERS
    if select.servable:
        chosen = select.model_copy(update={"options": ("lora",)})
        return config.model_copy(update={"select": chosen}), _ON_CHOSEN_LAYERS
    return config, ""

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

LORA_INSTEAD = (
    "LoRA on all linear layers, as it has lower losses on language models whose budget holds it; "
    "select.groups=element chooses single elements"
)


def for_model(config: Config, structure: PreTrainedModel) -> Config:
    """Return the config with method ``lora`` if ``select`` leaves the kind open and a language model's budget holds it.

    With as many parameters, LoRA on all linear layers has lower losses there than single elements, chosen or drawn: by
    0.06 on nl2bash and 0.15 on WikiText-2 (tests/benchmarks/results). It needs no measurement, so this is decided
    before any.

    Args:
        config: config of a run.
        structure: the model that it names, with or without weights.
    """
    select, is_language_model = config.select, not TASKS[config.model.task].has_head
    is_open = isinstance(select, AdaPEFTOptions) and select.leaves_kind_open and config.train.subset is None
    if not (is_language_model and is_open):
        return config
    groups = groups_of(structure, select)
    least = least_lora(groups)
    if least is None or least > (select.budget.number or select.budget.count(groups.num_total)):
        return config
    shared = {name: getattr(select, name) for name in Select.model_fields if name not in ("method", "groups")}
    return config.model_copy(update={"select": LoRAOptions(method="lora", **shared)})

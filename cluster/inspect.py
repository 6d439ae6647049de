"""What can be known before anything is measured: the data, the structure, the budget. No weights, no workers."""

from __future__ import annotations

from dataclasses import dataclass

from adapeft.choose.choose import check_budget
from adapeft.config import Config
from adapeft.inputs.batches import draw_calibration
from adapeft.inputs.data import DataDescription, describe
from adapeft.inputs.metrics import primary
from adapeft.inputs.model import build_structure, check_inputs, load_model_config, load_tokenizer
from adapeft.measure.groups import Groups, build_groups


@dataclass(frozen=True)
class Inspection:
    """A config found good.

    Attributes:
        architecture: class of the model.
        description: of the data.
        groups: the candidates, without a fingerprint.
        budget: in elements.
        num_always_trained: elements outside the budget.
    """

    architecture: str
    description: DataDescription
    groups: Groups
    budget: int
    num_always_trained: int


def inspect(config: Config) -> Inspection:
    """Checks data, model structure, patterns and budget.

    Raises:
        AdapeftError: whatever would fail later, said now.
    """
    description = describe(config.data, config.model.task)
    primary(config.data.metric, config.model.task, description.is_regression)
    if config.model.task != "causal-lm":  # there the number of blocks is known only after tokenizing
        calibration = config.select.calibration
        draw_calibration(description.num_train, calibration, config.select.batch_size, config.cluster.workers, 0)
    model_config = load_model_config(config.model, description, load_tokenizer(config.model))
    check_inputs(config.model, config.data, model_config, description)
    structure = build_structure(model_config, config.model.task, trust_remote_code=config.model.trust_remote_code)
    select = config.select
    groups = build_groups(
        structure,
        select.granularity,
        always_train=select.always_train,
        include=select.include,
        exclude=select.exclude,
    )
    counts = {name: parameter.numel() for name, parameter in structure.named_parameters()}
    return Inspection(
        type(structure).__name__,
        description,
        groups,
        check_budget(groups, select.budget),
        sum(counts[name] for name in groups.always_train),
    )

"""The library's ``select``: measure and choose in one process, on batches of any script's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapeft.choose.choose import check_budget, choose
from adapeft.choose.empty import check_not_empty
from adapeft.choose.subset import Subset
from adapeft.config_file import parse_select
from adapeft.errors import AdapeftError
from adapeft.inputs.batches import Calibration
from adapeft.inputs.data import Batch
from adapeft.inputs.objective import infer_objective
from adapeft.inputs.wrappers import ATTACHMENT, bare
from adapeft.measure.groups import groups_of
from adapeft.measure.influence import reach_of
from adapeft.measure.measure import check_precision, measure
from adapeft.measure.passes import Passes
from adapeft.measure.shards import WholeModel, measuring_mode
from adapeft.methods import get_method

_OF_THE_COMMAND = {"calibration", "batch_size", "micro_batch_size", "statistics", "memory_per_device"}


def select(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    budget: str | float | int = "0.5%",
    learning_rate: float = 1e-3,
    num_steps: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Subset:
    """Measures ``model`` on ``batches`` and chooses the subset to train under ``budget``.

    Args:
        model: a transformers model, which may be compiled or wrapped in DistributedDataParallel; its weights are as
            before when this returns.
        batches: what a DataLoader of the Trainer yields: mappings with ``labels`` beside the model's inputs. 16 to 64
            of about 16 examples will do; the first half gives the direction, the second the gain along it.
        budget: fraction (``"0.5%"``) or count of the base model's parameters.
        learning_rate: of the training to come, whose reach limits the influence.
        num_steps: of the training to come.
        seed: of sampled labels and random draws.
        options: keys of the config's ``select`` section (``method``, ``groups``, ``include``, ``reach`` …), but for
            those that say how a command batches its calibration: here ``batches`` do.

    Raises:
        AdapeftError: fewer than two batches, a batch without labels, an invalid option or budget, or a model that is
            sharded, has PEFT's layers, or has a subset attached.
    """
    model = bare(model, "select")
    if hasattr(model, ATTACHMENT):
        raise AdapeftError(
            "this model has a subset attached, whose leaves are no candidates: call adapeft.detach(model) first."
        )
    for option in sorted(_OF_THE_COMMAND & options.keys()):
        raise AdapeftError(
            f"select.{option} = {options[option]!r} is the command's: here the batches you give decide it."
        )
    settings = parse_select({"budget": budget, **options})
    examples = _as_batches(batches, next(model.parameters()).device)
    if get_method(settings.method).measures_examples:
        examples = [batch.example(index) for batch in examples for index in range(len(batch.labels))]
    middle = len(examples) // 2
    order = tuple(np.array([index]) for index in range(len(examples)))
    groups = groups_of(model, settings)
    check_budget(groups, settings)
    candidates = [info.name for info in groups.parameters]
    check_precision(settings, next(model.parameters()).dtype)
    displaced = candidates if settings.displaces_weights else []
    with measuring_mode(model, restore=[*groups.always_train, *displaced]):
        shards = WholeModel(model, candidates, groups.always_train)
        passes = Passes(
            shards,
            infer_objective(model, examples[0].inputs, examples[0].labels),
            Calibration(order[:middle], order[middle:]),
            lambda indices: examples[int(indices[0])],
            seed,
        )
        statistics = measure(get_method(settings.method), passes, groups, settings)
    reach = reach_of(settings, learning_rate * num_steps, num_steps)
    subset = choose(settings, statistics, reach=reach, seed=seed, ranks=shards.ranks)
    check_not_empty(subset)
    return subset


def _as_batches(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> list[Batch]:
    examples, seen = [], 0
    for batch in batches:
        if "labels" not in batch:
            raise AdapeftError(f"a batch has no 'labels', only {', '.join(map(repr, batch))}: measuring needs them.")
        labels = batch["labels"]
        ids = torch.arange(seen, seen + len(labels))
        seen += len(labels)
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        examples.append(Batch(inputs, labels.to(device), ids))
    if len(examples) < 2:
        raise AdapeftError(f"batches: {len(examples)} given, at least 2 are needed to measure gradient and gain apart.")
    return examples

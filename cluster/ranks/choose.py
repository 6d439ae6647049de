"""Choosing from measured statistics, on a rank or in the launching process."""

from __future__ import annotations

from collections.abc import Mapping

from adapeft.choose.knapsack import chosen_of
from adapeft.choose.options import options_of
from adapeft.config.config import Config
from adapeft.config.keys import measurement_key
from adapeft.config.write import to_yaml
from adapeft.measure.directions import Directions
from adapeft.measure.influence import reach_of
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.measure.storage import save_groups, save_options
from adapeft.memory.limit import MemoryLimit
from adapeft.methods.lora.method import least_lora
from adapeft.methods.registry import get_method
from adapeft.ranks import Ranks
from adapeft.selection.choose import choose, completed, judged
from adapeft.subset.subset import Subset
from adapeft.tasks.registry import TASKS
from cluster.inspection.plan import plan_training
from cluster.output.folder import RunFolder


def choose_and_save(
    config: Config,
    contents: Mapping[str, str],
    statistics: Statistics,
    num_examples: int | None,
    ranks: Ranks,
    limit: MemoryLimit | None,
    passes: Passes | None = None,
    before: Directions | None = None,
) -> Subset:
    """Choose from ``statistics`` and write ``groups.parquet`` and ``subset.safetensors``. Collective.

    The launching process also calls this, as a single rank, if the statistics exist or no worker is needed for them.
    It has no passes to count directions, and takes those of the first choice from these statistics, ``before``.
    """
    groups = statistics.groups
    training = plan_training(config.train, num_examples)
    reach = reach_of(config.select, sum(training.learning_rates()), training.num_steps)
    subset = choose(config.select, statistics, reach=reach, seed=config.seed, ranks=ranks, limit=limit)
    if passes is not None:
        subset = judged(subset, passes, groups, config.select, config.seed, limit)
    else:
        subset = completed(groups, subset, before, config.select, config.seed, limit)
    if TASKS[config.model.task].predicts_tokens:
        subset = subset.described(lora_from=least_lora(groups))
    subset = subset.described(config=to_yaml(config), contents=dict(contents))
    if ranks.rank == 0:
        derived = {"chosen": chosen_of(groups, subset)}
        values = get_method(config.select.method).group_values(statistics, reach)
        if values is not None:
            derived["influence"] = values
        folder = RunFolder.of(config)
        key = measurement_key(config, contents, groups.num_total, is_quantized=groups.is_quantized)
        save_groups(folder.path, groups, statistics.columns, key, **derived)
        options = statistics.options
        if options is not None:
            influence = get_method(config.select.method).option_values(statistics, reach)
            assert influence is not None
            chosen = options_of(groups, options, subset)
            save_options(folder.path, groups, options, influence=influence, chosen=chosen)
        subset.save(folder.subset)
    return subset

"""The learning rate of a new head on ranks, ``train.head_learning_rate: auto``."""

from __future__ import annotations

from deepspeed import DeepSpeedEngine

from adapeft.tune.head_rate import rate_of_head, reading_head
from cluster.ranks.inputs import Inputs
from cluster.zero.engine import DistributedRanks, set_head_rate

_EXAMPLES = 32


def find_head_rate(engine: DeepSpeedEngine, inputs: Inputs, ranks: DistributedRanks) -> None:
    """Give the new head of an engine's model the rate of ``adapeft.head_learning_rate`` if the config asks for it.

    Does nothing without a new head. Collective: every rank reads the same training examples, so all find the same rate.

    Args:
        engine: engine of the training, before its first step.
        inputs: inputs of the run; the first examples of the first epoch are read.
        ranks: ranks that train.
    """
    if inputs.config.train.head_learning_rate != "auto":
        return
    examples, size = inputs.training_batches(epoch=0)[0][:_EXAMPLES], inputs.micro_batch_size(ranks.world_size)
    with reading_head(engine.module) as sizes:
        if not sizes.layers:
            return
        for start in range(0, len(examples), size):
            batch = inputs.train.collate(examples[start : start + size]).to(ranks.device)
            inputs.objective.example_losses(engine, batch)
    set_head_rate(engine, rate_of_head(sizes))

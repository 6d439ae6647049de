"""Rules under ZeRO: each rank follows them on what its optimizer steps of the leaves."""

from __future__ import annotations

from deepspeed import DeepSpeedEngine
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.ranks import OneRank, Ranks
from adapeft.tune.attachment import attachment_of
from adapeft.tune.follower import Follower
from adapeft.tune.shards import leaf_shards, whole
from cluster.zero.engine import DistributedRanks
from cluster.zero.master_weights import MasterWeights


def follow_in_engine(
    engine: DeepSpeedEngine, model: nn.Module, ranks: DistributedRanks, num_steps: int, step: int
) -> Follower:
    """Keeps the rule of ``model``'s subset while ``engine`` trains it.

    DeepSpeed calls the optimizer once for each of its groups: gradients are edited there, and whoever trains calls
    ``after_step`` once all are stepped.

    Raises:
        AdapeftError: bf16 without ZeRO, whose optimizer hides its float32 weights.
    """
    attachment = attachment_of(model)
    stage = engine.zero_optimization_stage()
    if attachment.dense and stage == 0 and engine.bfloat16_enabled():
        raise AdapeftError(
            f"cluster.zero_stage = 0 with model.dtype = bfloat16 does not go with the method "
            f"{attachment.subset.choice.method}. Take a zero_stage of 1, 2 or 3."
        )
    masters = MasterWeights(engine, ranks)
    # At stage 0 every rank holds everything, and all do the same to it.
    owners: Ranks = ranks if stage else OneRank()
    leaves = leaf_shards(attachment, masters.range_of if stage else whole, owners, masters.publish)
    return attachment.follow(leaves, engine.basic_optimizer, num_steps, step)

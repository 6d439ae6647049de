"""Rules under ZeRO: each rank applies them to the parts of the leaves that its optimizer steps."""

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
    """Return a follower that applies the rule of ``model``'s subset while ``engine`` trains it.

    DeepSpeed calls the optimizer once per parameter group, and gradients are edited in these calls. The training loop
    calls ``after_step`` once all groups are stepped.

    Raises:
        AdapeftError: bf16 without ZeRO, where DeepSpeed's optimizer does not expose its float32 weights.
    """
    attachment = attachment_of(model)
    stage = engine.zero_optimization_stage()
    if attachment.dense and stage == 0 and engine.bfloat16_enabled():
        raise AdapeftError(
            f"cluster.zero_stage = 0: not supported with model.dtype = bfloat16 and select.method = "
            f"{attachment.subset.choice.method}. Set cluster.zero_stage to 1, 2 or 3."
        )
    masters = MasterWeights(engine, ranks)
    # At stage 0 every rank holds all values and applies the same changes.
    owners: Ranks = ranks if stage else OneRank()
    leaves = leaf_shards(attachment, masters.range_of if stage else whole, owners, masters.publish)
    return attachment.follow(leaves, engine.basic_optimizer, num_steps, step)

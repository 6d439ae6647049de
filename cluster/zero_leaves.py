"""Leaves under ZeRO: what each rank's optimizer steps of them, and how a change reaches the weights."""

from __future__ import annotations

from deepspeed import DeepSpeedEngine
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.ranks import OneRank, Ranks
from adapeft.tune.attach import attachment_of
from adapeft.tune.follow import Follower
from adapeft.tune.leaf_shards import Range, leaf_shards, whole
from cluster.engine import DistributedRanks


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
            f"{attachment.subset.description.get('method')}. Take a zero_stage of 1, 2 or 3."
        )
    zero = _Zero(engine, ranks, stage)
    # At stage 0 every rank holds everything, and all do the same to it.
    owners: Ranks = ranks if stage else OneRank()
    leaves = leaf_shards(attachment, zero.range_of if stage else whole, owners, zero.publish)
    return Follower(attachment, leaves, engine.basic_optimizer, num_steps, step)


class _Zero:
    """Where DeepSpeed keeps a parameter's float32 values, read as ``cluster.zero_shards`` reads gradients."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks, stage: int) -> None:
        self._optimizer, self._ranks, self._stage = engine.optimizer, ranks, stage

    def range_of(self, leaf: nn.Parameter) -> Range | None:
        """This rank's range of ``leaf``. Stage 3 divides each evenly and pads; stages 1 and 2 cut a flattened group."""
        optimizer = self._optimizer
        if self._stage == 3:
            group, offset, part = optimizer.grad_position[optimizer.get_param_id(leaf)]
            total: int = leaf.ds_numel  # type: ignore[attr-defined]
            start = min(self._ranks.rank * part, total)
            return Range(optimizer.fp32_partitioned_groups_flat[group], offset, start, min(part, total - start))
        mapping = leaf._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        place = mapping.hp_fragment_address
        # At stage 1 in bf16 another of DeepSpeed's optimizers is at work, where the same thing has another name.
        is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
        flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
        return Range(flats[mapping.param_group_index], place.start, mapping.lp_fragment_address.start, place.numel)

    def publish(self) -> None:
        """Copies changed float32 values to the weights of all ranks, as the optimizer's step does. Collective."""
        optimizer = self._optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        if self._stage == 3:
            optimizer._partition_all_parameters()
            for weights, values in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                weights.data.copy_(values.data)
            if optimizer.persistent_parameters:  # kept whole on every rank
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

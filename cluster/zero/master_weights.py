"""Access to the float32 master weights of DeepSpeed's optimizers."""

from __future__ import annotations

from deepspeed import DeepSpeedEngine
from torch import nn

from adapeft.ranks import Ranks
from adapeft.tune.shards import Range, whole


class MasterWeights:
    """Float32 master weights of an engine's trainable parameters."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self._optimizer, self._ranks, self._stage = engine.optimizer, ranks, engine.zero_optimization_stage()
        # Without ZeRO only parameters in bf16 have a float32 copy.
        pairs = (getattr(self._optimizer, name, ()) for name in ("fp16_groups", "fp32_groups"))
        groups = zip(*pairs, strict=True) if self._stage == 0 else ()
        self._copied = [pair for members in groups for pair in zip(*members, strict=True)]
        self._copies = {id(parameter): copy for parameter, copy in self._copied}

    def range_of(self, parameter: nn.Parameter) -> Range | None:
        """Return this rank's range of ``parameter``, or None if it holds nothing of it.

        Stage 3 divides each parameter evenly, stages 1 and 2 divide a flattened group. At stage 0 every rank holds the
        whole parameter.
        """
        optimizer = self._optimizer
        if self._stage == 0:
            return whole(self._copies.get(id(parameter), parameter))
        if self._stage == 3:
            group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            total: int = parameter.ds_numel  # type: ignore[attr-defined]
            start = min(self._ranks.rank * part, total)
            return Range(optimizer.fp32_partitioned_groups_flat[group], offset, start, min(part, total - start))
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        place = mapping.hp_fragment_address
        # At stage 1 in bf16 DeepSpeed uses another optimizer, in which the same attribute has another name.
        is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
        flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
        return Range(flats[mapping.param_group_index], place.start, mapping.lp_fragment_address.start, place.numel)

    def publish(self) -> None:
        """Copy changed float32 values to the weights of all ranks, as the optimizer's step does. Collective."""
        optimizer = self._optimizer
        for parameter, copy in self._copied:
            parameter.data.copy_(copy.data)
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

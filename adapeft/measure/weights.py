"""Statistics of pretrained weights, read from the checkpoint a few tensors at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.measure import check_measured
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.measure.storage import load_elements, save_elements_one_by_one
from adapeft.model.checkpoint.checkpoint import Checkpoint
from adapeft.ranks import OneRank

if TYPE_CHECKING:
    from adapeft.sections.select import Select

BLOCK = 2**18
"""Most elements in one shard. Choosing takes about 36 bytes for each element of a shard, in temporary tensors that
glibc fragments if they are larger: 110 M elements took 1.1 GiB in shards of 2**22, and less than 1 MiB in these."""


def measure_weights(
    checkpoint: Checkpoint,
    groups: Groups,
    settings: Select,
    name: str,
    score: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    folder: Path,
) -> Statistics:
    """Return one statistic of the weights: its sums over the groups and, at ``element`` granularity, every value.

    The values of elements are views of files that this writes to ``folder``, so that only as many values as the
    largest candidate has are in memory.

    Args:
        checkpoint: the weights.
        groups: the candidates.
        settings: ``select`` section of the config.
        name: column of the statistic.
        score: function from float32 weights to their statistic.
        dtype: dtype in which the model is loaded.
        folder: folder of the run.

    Raises:
        AdapeftError: a value is not finite.
    """
    sums = torch.zeros(groups.num_groups, dtype=torch.float64)
    places = {info.name: index for index, info in enumerate(groups.parameters)}

    def scored(names: set[str]) -> Iterator[ElementShard]:
        for parameter, weight in checkpoint.tensors(names):
            index = places[parameter]
            values = score(weight.to(dtype).flatten().float())
            touched, partial = groups.sums(index, 0, values)
            sums[touched] += partial
            for start, block in enumerate(values.split(BLOCK)):
                yield ElementShard(Slice(index, start * BLOCK, len(block)), {name: block})

    def checked(names: set[str]) -> tuple[ElementShard, ...]:
        shards = tuple(scored(names))
        check_measured(Statistics(groups, {}, shards), settings, OneRank())
        return shards

    elements: tuple[ElementShard, ...] = ()
    if groups.granularity == "element":
        pieces = _pieces(groups)
        save_elements_one_by_one(folder, map(checked, pieces), len(pieces))
        elements = load_elements(folder, groups)
    else:
        deque(scored(set(places)), maxlen=0)
    found = Statistics(groups, {name: sums.numpy()}, elements)
    check_measured(found, settings, OneRank())
    return found


def _pieces(groups: Groups) -> list[set[str]]:
    """Divide the candidates' names among files with no more elements each than the largest candidate."""
    largest = max(info.count for info in groups.parameters)
    pieces: list[set[str]] = [set()]
    count = 0
    for info in groups.parameters:
        if count + info.count > largest:
            pieces.append(set())
            count = 0
        pieces[-1].add(info.name)
        count += info.count
    return pieces

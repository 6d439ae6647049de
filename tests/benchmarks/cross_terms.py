"""Cross terms of a subset: its joint curvature compared with the sum of the curvatures of its tensors.

``python -m tests.benchmarks.cross_terms RUN…`` takes folders of finished runs on one task and prints a table. An
additive choice sums the curvatures of single groups. If the joint curvature is much larger, the chosen groups change
the model's output in similar ways, and training needs smaller steps than for each group alone.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.measure.direction import measure_direction
from adapeft.measure.groups import Groups, groups_of
from adapeft.measure.measure import ready
from adapeft.measure.passes import Passes
from adapeft.measure.projections import measure_projections
from adapeft.measure.shards.shards import Slice
from adapeft.methods.registry import get_method
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder
from cluster.ranks.inputs import load_inputs
from cluster.ranks.measure import measuring_passes
from cluster.zero.engine import join


def main(folders: list[Path]) -> None:
    """Measure the subset of every run along Adam's direction, as the method ``adapeft`` does, and print the table."""
    subsets = {folder: Subset.load(RunFolder(folder).subset) for folder in folders}
    config = load_config(RunFolder(folders[0]).config)
    print("| run | elements | slope b | curvature: tensors alone | joint A | best step b / A | gain b² / 2A |")
    print("|---|---|---|---|---|---|---|")
    with measured(config) as (passes, groups, direction):
        for folder, subset in subsets.items():
            pieces = zip(passes.shards.slices, direction, strict=True)
            masked = [along * mask_of(subset, groups, piece) for piece, along in pieces]
            columns = measure_projections(passes, groups, masked)
            slope, of_tensors = columns["slope"].sum(), columns["projections"].astype(np.float64)
            alone, joint = (of_tensors**2).sum(), (of_tensors.sum(axis=0) ** 2).sum()
            name = "/".join(folder.parts[-3:])
            figures = (f"{number:.3g}" for number in (slope, alone, joint, slope / joint, slope**2 / (2 * joint)))
            print(f"| {name} | {subset.count:,} | {' | '.join(figures)} |", flush=True)


@contextmanager
def measured(config: Config) -> Iterator[tuple[Passes, Groups, list[Tensor]]]:
    """Yield passes with a head warmed up on half B, the tensors as groups, and Adam's direction from half A."""
    be_the_only_rank()
    ranks = join()
    inputs = load_inputs(config)
    model = inputs.model().eval()
    settings = config.select.model_copy(update={"groups": "tensor"})
    groups = groups_of(model, settings)
    with measuring_passes(config, inputs, model, groups, settings.batch_size, ranks, lambda event: None) as plain:
        passes = ready(get_method("adapeft"), plain, groups, settings)
        passes.warm_up(passes.calibration.half_a)
        direction = measure_direction(passes, "adam")
        passes.warm_up(passes.calibration.half_b)
        yield passes, groups, direction


def mask_of(subset: Subset, groups: Groups, piece: Slice) -> Tensor:
    """Return the mask of the slice's elements in the subset, bool ``[length]``."""
    part = subset.parts.get(groups.parameters[piece.parameter].name)
    if part is None:
        return torch.zeros(piece.length, dtype=torch.bool)
    return part.mask(piece.start, piece.start + piece.length)


def be_the_only_rank() -> None:
    """Set the environment variables of a launcher for rank 0 of 1."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


if __name__ == "__main__":
    main([Path(folder).resolve() for folder in sys.argv[1:]])

"""Conditioning of the training of a subset: the spectrum of the Gram matrix of its gradients.

``python -m tests.benchmarks.conditioning RUN…`` takes folders of finished runs on one task and prints a table. Adam
moves every element by about the learning rate, so with gradients g of single examples at sampled labels, the output
changes according to :math:`K = \\sum_j g_j g_j^\\top / \\mathrm{rms}(g_j)` over the subset's elements j. Its largest
eigenvalue limits the learning rate; the ratios of the others to it give the relative speeds of learning.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from adapeft.config.load import load_config
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder
from tests.benchmarks.cross_terms import mask_of, measured


def main(folders: list[Path]) -> None:
    """Measure on half B of the first run's calibration, one example at a time, and print the table."""
    subsets = [Subset.load(RunFolder(folder).subset) for folder in folders]
    config = load_config(RunFolder(folders[0]).config)
    config = config.model_copy(update={"select": config.select.model_copy(update={"batch_size": 1})})
    with measured(config) as (passes, groups, _):
        gradients = _gradients(passes, groups, subsets)
    print("| run | elements | λ₁ | λ₂ / λ₁ | λ₈ / λ₁ | λ₃₂ / λ₁ | effective rank |")
    print("|---|---|---|---|---|---|---|")
    for folder, subset, rows in zip(folders, subsets, gradients, strict=True):
        spectrum = _spectrum(rows)
        ratios = " | ".join(f"{spectrum[number - 1] / spectrum[0]:.3f}" for number in (2, 8, 32))
        rank = spectrum.sum() ** 2 / (spectrum**2).sum()
        name = "/".join(folder.parts[-3:])
        print(f"| {name} | {subset.count:,} | {spectrum[0]:.3g} | {ratios} | {rank:.0f} |")


def _gradients(passes: Passes, groups: Groups, subsets: list[Subset]) -> list[Tensor]:
    """Return the gradients of each subset, float32 ``[examples, elements]``."""
    masks = [[mask_of(subset, groups, piece) for piece in passes.shards.slices] for subset in subsets]
    rows: list[list[Tensor]] = [[] for _ in subsets]
    for gradients, _ in passes.gradients("spectrum", passes.calibration.half_b, [], sampled_labels=True):
        for chosen, mine in zip(masks, rows, strict=True):
            mine.append(torch.cat([gradient[mask] for gradient, mask in zip(gradients, chosen, strict=True)]))
    return [torch.stack(mine) for mine in rows]


def _spectrum(gradients: Tensor) -> Tensor:
    """Return the eigenvalues of K ``[examples, examples]`` in descending order."""
    rms = gradients.square().mean(dim=0).sqrt()
    weighted = gradients / rms.clamp(min=float(rms.mean()) * 1e-3)
    return torch.linalg.eigvalsh((weighted @ gradients.T).double()).flip(0)


if __name__ == "__main__":
    main([Path(folder).resolve() for folder in sys.argv[1:]])

"""The fingerprint of a base model: what a subset or a delta belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

_SAMPLE = 65_536


def fingerprint_model(model: nn.Module, new: Collection[str] = ()) -> str:
    """Fingerprint of a model in memory, without its ``new`` parameters, which no base checkpoint holds.

    Empty for a model without weights.
    """
    if next(model.parameters()).is_meta:
        return ""
    prefix = getattr(model, "base_model_prefix", "")
    return fingerprint(
        (base_name(name, prefix), sample(parameter.detach()), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if name not in new
    )


def fingerprint(entries: Iterable[tuple[str, Tensor, tuple[int, ...]]]) -> str:
    """Hash of (name, sample, shape) of every tensor, in any order."""
    digest = hashlib.sha256()
    for name, picks, shape in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"{name}{shape}".encode())
        digest.update(picks.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def sample(tensor: Tensor) -> Tensor:
    """Up to 65,536 evenly spaced values, rounded to bfloat16: the same whatever dtype the model was loaded in.

    Another checkpoint differs in the samples of some tensor, and so does this one after a delta of a few thousand
    elements; a change of fewer, or smaller than bfloat16 resolves, may go unnoticed.
    """
    flat = tensor.flatten()
    picks = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLE), dtype=torch.float64).long()
    return flat[picks.to(flat.device)].to(torch.bfloat16).cpu()


def base_name(name: str, prefix: str) -> str:
    """A parameter's name without the base model's prefix, which checkpoints of the base model leave out."""
    return name.removeprefix(f"{prefix}.") if prefix else name

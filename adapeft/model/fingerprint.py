"""Fingerprints of base models, by which a subset or delta identifies the base that it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adapeft.model.divided import is_partitioned, picked, shape_of

Entry = tuple[str, Tensor, tuple[int, ...]]
"""(name without the base model's prefix, sample, shape) of a parameter."""

RESIZED = (
    "If the vocabulary was resized before training, save the base with save_pretrained after resizing and before "
    "training, and give that folder."
)
_SAMPLE = 65_536
DIGEST_BYTES = 7
"""Digest bytes per parameter: four of its name, one of its shape, two of its sample. They locate a difference between
two models whose fingerprints differ, and are too few to detect one."""


def fingerprint_model(model: nn.Module, new: Collection[str] = ()) -> str:
    """Return the fingerprint of a model in memory, without its ``new`` parameters, which no base checkpoint holds.

    Empty for a model without weights, of which some classes, such as XLNet's, still give values to a few parameters.
    """
    return "" if any(parameter.is_meta for parameter in model.parameters()) else fingerprint(entries_of(model, new))


def entries_of(model: nn.Module, new: Collection[str] = ()) -> Iterator[Entry]:
    """Yield the fingerprint entries of a model in memory, without its ``new`` parameters."""
    prefix = getattr(model, "base_model_prefix", "")
    for name, parameter in model.named_parameters():
        if name not in new:
            yield entry_of(base_name(name, prefix), parameter)


def entry_of(name: str, parameter: Tensor) -> Entry:
    """Return the fingerprint entry of the parameter ``name``, sampled from its values.

    For the four-bit codes of bitsandbytes the sample is the count of each code: on a CPU with AVX512-BF16 the first
    forward pass in eval mode changes their layout and shape, so the bytes of one base differ before and after.
    """
    quantized = getattr(parameter, "quant_state", None)
    if quantized is None:
        shape = shape_of(parameter)
        if is_partitioned(parameter):
            return name, picked(parameter, _places(torch.Size(shape).numel())), shape
        return name, sample(parameter.detach()), shape
    pairs = parameter.detach().contiguous().view(torch.uint8).flatten().bincount(minlength=256).view(16, 16)
    # As bytes, because bfloat16 cannot represent the counts.
    return name, sample((pairs.sum(0) + pairs.sum(1)).view(torch.uint8)), tuple(quantized.shape)


def digests_of(entries: Iterable[Entry]) -> Tensor:
    """Return a short digest of every parameter, uint8 [count, 7], to locate the parameters in which a model differs."""
    rows = [_hash(name, 4) + _hash(str(shape), 1) + _hash(_bytes(picks), 2) for name, picks, shape in entries]
    return torch.tensor(list(b"".join(rows)), dtype=torch.uint8).reshape(len(rows), DIGEST_BYTES)


def difference_from(digests: Tensor, entries: Iterable[Entry]) -> str:
    """Return a sentence on how the model of ``entries`` differs from the one of ``digests``; empty if unknown."""
    known = {bytes(row[:4]): bytes(row[4:]) for row in digests.tolist()}
    others: list[str] = []
    reshaped: list[str] = []
    changed: list[str] = []
    for name, picks, shape in entries:
        found = known.pop(_hash(name, 4), None)
        if found is None:
            others.append(repr(name))
        elif found[:1] != _hash(str(shape), 1):
            reshaped.append(f"{name!r}, here {shape}")
        elif found[1:] != _hash(_bytes(picks), 2):
            changed.append(repr(name))
    if others or known:
        example = f", such as {others[0]}" if others else ""
        return (
            f"That base lacks {len(others)} parameters of this one{example}, and has {len(known)} that this one lacks."
        )
    if reshaped:
        return f"That base has other shapes: {_few(reshaped)}. {RESIZED}"
    return f"They differ in {_few(changed)} of {len(digests)} parameters." if changed else ""


def has_names(digests: Tensor, names: Iterable[str]) -> bool:
    """Whether ``digests`` are those of parameters with exactly these names."""
    return {bytes(row[:4]) for row in digests.tolist()} == {_hash(name, 4) for name in names}


def changed_names(digests: Tensor, entries: Iterable[Entry]) -> list[str]:
    """Return the names of ``entries`` that have another shape or other values in ``digests``."""
    known = {bytes(row[:4]): bytes(row[4:]) for row in digests.tolist()}
    return [
        name
        for name, picks, shape in entries
        if (found := known.get(_hash(name, 4))) and found != _hash(str(shape), 1) + _hash(_bytes(picks), 2)
    ]


def fingerprint(entries: Iterable[Entry]) -> str:
    """Return a hash of (name, sample, shape) of every tensor, independent of their order."""
    digest = hashlib.sha256()
    for name, picks, shape in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"{name}{shape}".encode())
        digest.update(_bytes(picks))
    return digest.hexdigest()


def sample(tensor: Tensor) -> Tensor:
    """Return up to 65,536 evenly spaced values, rounded to bfloat16: the same for every dtype the model is loaded in.

    Another checkpoint differs in the samples of some tensor, and so does this one after a delta of a few thousand
    elements; a change of fewer elements, or one below bfloat16's resolution, may go unnoticed.
    """
    flat = _numbers(tensor).flatten()
    picks = _places(len(flat))
    return flat[picks.to(flat.device)].to(torch.bfloat16).cpu()


def _places(count: int) -> Tensor:
    return torch.linspace(0, max(count - 1, 0), min(count, _SAMPLE), dtype=torch.float64).long()


def _numbers(tensor: Tensor) -> Tensor:
    """Return a dense real tensor whose elements can be picked and rounded: dequantized, dense, or viewed as bytes."""
    if is_traceable_wrapper_subclass(tensor):
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def base_name(name: str, prefix: str) -> str:
    """Return a parameter's name without the base model's prefix, which checkpoints of the base model leave out."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def _bytes(picks: Tensor) -> bytes:
    return picks.view(torch.int16).numpy().tobytes()


def _hash(content: str | bytes, count: int) -> bytes:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()[:count]


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

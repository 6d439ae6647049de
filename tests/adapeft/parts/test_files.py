"""Tests that files with parts of every kind stay as they are, and that those of earlier versions load."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from adapeft.deltas.delta import Delta
from adapeft.parts.adapter import Adapter
from adapeft.parts.change import Change
from adapeft.parts.dense import Dense
from adapeft.parts.elements import Elements
from adapeft.parts.indexed import Indexed
from adapeft.parts.lora import Lora
from adapeft.parts.registry import KINDS
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset

PARTS = {
    "a.weight": Whole((6, 4)),
    "b.weight": Rows((6, 4), torch.tensor([1, 5])),
    "c.weight": Rows((6, 4), torch.tensor([0, 3]), 1),
    "d.weight": Elements((6, 4), torch.tensor([0, 7, 23])),
    "e.weight": Dense((6, 4)),
    "f.weight": Lora((6, 4), 0, 2, 3.0),
    "g.weight": Lora((6, 4), 1, 1, 0.5),
    "h": Adapter((6,), 2),
}
SHAPES = {
    "a.weight": (6, 4),
    "b.weight": (2, 4),
    "c.weight": (2, 6),
    "d.weight": (3,),
    "f.weight": (20,),
    "g.weight": (10,),
    "h": (32,),
}
OLDER = {
    "subset": "7ac3a91363988f98f097f9009eb746e1fa76013fb846b95bfc4b51f598a48a98",
    "delta": "ba3c0f97c5162d899311b199a7405505c05b04c641dcd513f3414dac57341fae",
}
"""Recorded at c5da2eb, when indices were int32."""
DIGESTS = {
    "subset": "2d58c52244ea09ba0b27291b0056b11cd0817d4af6a2de5c1dd1041f127e65e6",
    "delta": "6c54f549b11fb0473fd8c7fe2a9384e0b6b1f0b5609089f36bd6ac9108af0456",
}
"""Recorded when indices became gaps."""


def numbers(shape: tuple[int, ...], start: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) / 8 + start


def artifact(kind: str) -> Subset | Delta:
    if kind == "subset":
        return Subset(PARTS, ("head",), ("head",), Choice(method="sam", budget=9, seed=5))
    changes = {name: Change(PARTS[name], numbers(shape, start)) for start, (name, shape) in enumerate(SHAPES.items())}
    digests = torch.arange(14, dtype=torch.uint8).view(2, 7)
    return Delta(
        changes, {"head": numbers((3,), 9)}, "f" * 64, {"method": "sam"}, {"count": torch.tensor([3])}, digests
    )


def digest(path: Path) -> str:
    """Hash the description and all tensors; safetensors writes the keys of its own header in any order."""
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["adapeft"])
        del said["provenance"]
        found = hashlib.sha256(json.dumps(said).encode())
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key)
            found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def test_every_kind_is_here():
    assert {part.kind for part in PARTS.values()} == set(KINDS)


@pytest.mark.parametrize("kind", DIGESTS)
def test_files_are_as_before(kind, tmp_path):
    artifact(kind).save(tmp_path / "file.safetensors")
    assert digest(tmp_path / "file.safetensors") == DIGESTS[kind]


@pytest.mark.parametrize("kind", OLDER)
def test_files_of_earlier_versions_load(kind, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(Indexed, "stored_indices", property(lambda part: part.indices.int()))
        artifact(kind).save(tmp_path / "older.safetensors")
    assert digest(tmp_path / "older.safetensors") == OLDER[kind]
    type(artifact(kind)).load(tmp_path / "older.safetensors").save(tmp_path / "again.safetensors")
    assert digest(tmp_path / "again.safetensors") == DIGESTS[kind]


@pytest.mark.parametrize("kind", DIGESTS)
def test_what_is_loaded_is_saved_again_alike(kind, tmp_path):
    artifact(kind).save(tmp_path / "file.safetensors")
    loaded = type(artifact(kind)).load(tmp_path / "file.safetensors")
    if isinstance(loaded, Subset):
        assert loaded.parts == PARTS
    else:
        assert {name: change.part for name, change in loaded.changes.items()} == {name: PARTS[name] for name in SHAPES}
    loaded.save(tmp_path / "again.safetensors")
    assert digest(tmp_path / "again.safetensors") == DIGESTS[kind]


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_equal_where_they_train_the_same(name):
    part = PARTS[name]
    others = [other for key, other in PARTS.items() if key != name]
    assert part == replace(part)
    assert part not in others
    if part.is_indexed:
        assert part != replace(part, indices=part.indices + 1)

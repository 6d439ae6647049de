"""Indices as gaps: the same indices again, in no more bytes than as they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapeft.parts.gaps import packed, unpacked


@given(st.sets(st.one_of(st.integers(0, 600), st.integers(0, 200_000), st.integers(0, 2**33))))
def test_they_are_the_same_again(chosen):
    indices = torch.tensor(sorted(chosen), dtype=torch.int64)
    limit = 1 + max(chosen, default=0)
    stored = packed(indices, limit)
    assert torch.equal(unpacked(stored), indices)
    assert stored.nbytes <= (4 if limit <= 2**31 else 8) * len(indices)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 65_534, 65_535, 65_536, 131_070])
def test_gaps_at_the_ends_of_their_types(gap):
    indices = torch.arange(40) * (gap + 1) + gap
    assert torch.equal(unpacked(packed(indices, int(indices[-1]) + 1)), indices)


@pytest.mark.parametrize(
    ("share", "dtype", "most"), [(2e-2, torch.uint8, 1.01), (5e-3, torch.uint8, 1.5), (1e-3, torch.uint16, 2.01)]
)
def test_a_random_draw(share, dtype, most, tmp_path):
    limit = 2**22
    indices = torch.randperm(limit, generator=torch.Generator().manual_seed(0))[: int(share * limit)].sort().values
    stored = packed(indices, limit)
    assert stored.dtype == dtype
    assert stored.nbytes <= most * len(indices)
    save_file({"indices": stored}, tmp_path / "file.safetensors")
    assert torch.equal(unpacked(load_file(tmp_path / "file.safetensors")["indices"]), indices)


def test_few_in_a_large_matrix_stay_as_they_are():
    indices = torch.tensor([5, 2**30])
    assert packed(indices, 2**31).dtype == torch.int32
    assert packed(indices + 2**32, 2**33).dtype == torch.int64


@pytest.mark.parametrize("stored", [torch.tensor([3, 255]), torch.tensor([[3, 4]])])
def test_damaged_gaps(stored):
    with pytest.raises(ValueError, match=r"does not end|of shape"):
        unpacked(stored.to(torch.uint8))

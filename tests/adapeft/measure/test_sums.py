"""Sums of parts, with parts that end within rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from adapeft.config.load import parse_select
from adapeft.measure import sums
from adapeft.measure.groups import groups_of
from adapeft.measure.projections import sum_over_groups
from adapeft.measure.shards.shards import Slice
from adapeft.ranks import OneRank
from tests.support.tiny import make_bert


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sums, "_SIZE", 7)


def test_parts_keep_their_positions():
    values = torch.arange(17.0)
    found = list(sums.parts_of(100, values, -values))
    assert [start for start, _ in found] == [100, 107, 114]
    assert torch.equal(torch.cat([part for _, (part, _) in found]), values)
    assert all(torch.equal(part, -other) for _, (part, other) in found)


def test_sums_are_in_float64():
    values = torch.full((20,), 1e8) + torch.arange(20.0) * 8
    assert sums.sum_of(values) == values.double().sum()
    assert sums.sum_of_squares(values) == values.double().square().sum()


@pytest.mark.parametrize("groups", ["row", "tensor"])
def test_sums_over_groups_are_those_of_whole_tensors(groups):
    candidates = groups_of(make_bert(), parse_select({"groups": groups}))
    pieces = [Slice(index, 3, info.count - 3) for index, info in enumerate(candidates.parameters)]
    values = [torch.randn(piece.length, dtype=torch.float64) for piece in pieces]
    shards = SimpleNamespace(slices=pieces, ranks=OneRank(), device=torch.device("cpu"))
    expected = torch.zeros(candidates.num_groups, dtype=torch.float64)
    for piece, value in zip(pieces, values, strict=True):
        touched, total = candidates.sums(piece.parameter, piece.start, value)
        expected[touched] += total
    assert torch.allclose(torch.from_numpy(sum_over_groups(shards, candidates, values)), expected, rtol=0, atol=1e-12)

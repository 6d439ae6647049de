"""Reliability of slopes: halves that agree, and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapeft.measure.groups import Groups, ParameterInfo
from adapeft.measure.reliability import reliability_of
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.ranks import OneRank
from tests.support.thread_ranks import on_ranks

SLOPES = [0.5, -0.25, 1.0, 0.0, -0.05]


def statistics_of(granularity, elements=(), **columns):
    groups = Groups((ParameterInfo("w", (5, 1), "w", 0, 0.0, 0),), granularity, 5)
    return Statistics(groups, {name: np.array(column) for name, column in columns.items()}, tuple(elements))


def test_of_groups():
    assert reliability_of(statistics_of("row", slope=SLOPES), OneRank()) == pytest.approx(1.2 / 1.8)
    assert reliability_of(statistics_of("row", slope=[[1.0, -1.0], [2.0, 0.0]]), OneRank()) == 0.5  # of a probe
    assert reliability_of(statistics_of("row", slope=[0.0] * 5), OneRank()) is None
    assert reliability_of(statistics_of("row", score=SLOPES), OneRank()) is None


def test_of_elements_on_ranks():
    """The column of a tensor is the sum over its elements, in which opposite slopes cancel."""

    def on_rank(ranks):
        mine = [(0, 2), (2, 5)][ranks.rank]
        shard = ElementShard(Slice(0, mine[0], mine[1] - mine[0]), {"slope": torch.tensor(SLOPES[slice(*mine)])})
        return reliability_of(statistics_of("element", [shard], slope=[sum(SLOPES)]), ranks)

    assert on_ranks(2, on_rank) == pytest.approx([1.2 / 1.8] * 2)

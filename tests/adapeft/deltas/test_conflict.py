"""The conflict report: counts, signs and cosines against dense float64 arithmetic."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from adapeft import AdapeftError, Delta, conflict_of, scaled
from adapeft.parts.adapter import Adapter
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from tests.adapeft.deltas.test_arithmetic import LAYER, NAME, PARTS, of_parts
from tests.oracles.deltas import dense_of, drawn_delta
from tests.support.tiny import make_bert

BIAS = "bert.encoder.layer.0.output.dense.bias"


@pytest.mark.parametrize(("first", "second"), combinations(PARTS, 2))
def test_one_parameter(first, second):
    deltas = of_parts(a=first, b=second)
    for delta in deltas.values():
        delta.changes[NAME].values.view(-1)[::3] = 0  # trained, but unchanged
    found = conflict_of(*deltas.values()).overlaps[NAME]
    a, b = (dense_of(delta.changes[NAME]) for delta in deltas.values())
    both = (a != 0) & (b != 0)
    assert found.counts == (int((a != 0).sum()), int((b != 0).sum()))
    assert found.both == int(both.sum()) > 0
    assert found.opposite == int((a[both] * b[both] < 0).sum())
    assert found.opposite_share == found.opposite / found.both
    cosine = float(a[both] @ b[both] / a[both].norm() / b[both].norm())
    assert found.cosine == pytest.approx(cosine, abs=1e-6)


def test_whole_deltas():
    model = make_bert()
    a = drawn_delta(model, {NAME: PARTS["rows"], BIAS: Whole((12,))}, 1)
    b = drawn_delta(
        model, {NAME: PARTS["columns"], NAME.replace("1", "0"): PARTS["lora"], BIAS: a.changes[BIAS].part}, 2
    )
    found = conflict_of(a, b)
    assert found.overlaps.keys() == {NAME, BIAS}
    assert found.total.both == found.overlaps[NAME].both + 12
    shared = sum(float((dense_of(a.changes[n]) * dense_of(b.changes[n])).sum()) for n in (NAME, BIAS))
    negative = sum(float((dense_of(a.changes[n]) * dense_of(b.changes[n])).clamp(max=0).sum()) for n in (NAME, BIAS))
    norms = [math.sqrt(sum(float(dense_of(c).square().sum()) for c in delta.changes.values())) for delta in (a, b)]
    assert found.cosine == pytest.approx(shared / norms[0] / norms[1], abs=1e-6)
    lost = sum(found.lost(overlap) for overlap in found.overlaps.values())
    assert lost == pytest.approx(-negative / norms[0] / norms[1], abs=1e-6)
    assert found.lost(found.total) == pytest.approx(lost)


def test_the_ends():
    (a,) = of_parts(a="rows").values()
    same, opposite = conflict_of(a, a), conflict_of(a, scaled(a, -3))
    assert (same.cosine, same.total.opposite) == (pytest.approx(1), 0)
    assert (opposite.cosine, opposite.total.opposite_share) == (pytest.approx(-1), 1)
    apart = conflict_of(a, drawn_delta(make_bert(), {NAME: Rows((12, 19), torch.tensor([0]))}, 1))
    assert (apart.total.both, apart.cosine) == (0, 0)
    assert math.isnan(apart.total.cosine)
    assert math.isnan(apart.total.opposite_share)


def test_what_has_no_entries():
    model = make_bert()
    a, b = (drawn_delta(model, {LAYER: Adapter((12,), 2)}, seed, head=True) for seed in (1, 2))
    found = conflict_of(a, b)
    assert found.adapters == (LAYER,)
    assert found.heads == ("classifier.weight", "classifier.bias")
    assert not found.overlaps
    assert math.isnan(found.cosine)
    assert conflict_of(a, a).heads == ()
    with pytest.raises(AdapeftError, match="only deltas of one base"):
        conflict_of(a, Delta({}, {}, "f" * 64))

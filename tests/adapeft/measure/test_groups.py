"""The group table: counts, indices, and sums of any slices against a dense oracle."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups, build_groups
from adapeft.model.structure import ParameterInfo
from adapeft.sections.select import Granularity
from tests.oracles.measuring import group_of_elements, group_sums
from tests.support.tiny import make_gpt2

SHAPES = (
    ParameterInfo("linear", (4, 7), "linear", 0, 0.0, 0),
    ParameterInfo("bias", (4,), "bias", 0, 0.0, None),
    ParameterInfo("conv1d", (5, 3), "conv1d", 1, 1.0, 1),
    ParameterInfo("experts", (2, 3, 2), "experts", 1, 1.0, None),
    ParameterInfo("other bias", (3,), "bias", 1, 1.0, None),
)


def add_up(groups, values, cuts):
    """Return the sums of values over groups, added up from slices of each parameter divided at ``cuts``."""
    total = torch.zeros(groups.num_groups, dtype=torch.float64)
    for index, value in enumerate(values):
        borders = [0, *sorted({min(cut, len(value)) for cut in cuts}), len(value)]
        for start, end in pairwise(borders):
            touched, sums = groups.sums(index, start, value[start:end])
            assert sums.dtype == torch.float64
            total[touched] += sums
    return total.numpy()


@pytest.mark.parametrize("granularity", get_args(Granularity))
@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 28), max_size=6))
def test_any_pieces_add_up_to_the_dense_sums(granularity, cuts):
    groups = Groups(SHAPES, granularity, num_total=62)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(info.count, generator=generator) for info in SHAPES]
    np.testing.assert_allclose(add_up(groups, values, cuts), group_sums(groups, values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_a_slice_touches_only_its_own_groups(granularity):
    groups = Groups(SHAPES, granularity, num_total=62)
    of = group_of_elements(groups)
    for index, info in enumerate(SHAPES):
        for start in range(info.count):
            touched, sums = groups.sums(index, start, torch.ones(1))
            expected = torch.zeros(groups.num_groups)
            expected[of[index][start]] = 1
            actual = torch.zeros(groups.num_groups)
            actual[touched] += sums.float()
            assert torch.equal(actual, expected)


def test_sums_keep_what_float32_would_lose():
    groups = Groups((ParameterInfo("bias", (3,), "bias", 0, 0.0, None),), "tensor", 3)
    assert float(groups.sums(0, 0, torch.tensor([2.0**24, 1.0, 1.0]))[1]) == 2**24 + 2


def test_rows_are_output_neurons():
    groups = Groups(SHAPES, "row", num_total=62)
    assert groups.sizes.tolist() == [4, 1, 3, 1, 1]
    assert groups.num_groups == 10
    assert groups.counts.tolist() == [7, 7, 7, 7, 4, 5, 5, 5, 12, 3]
    assert groups.indices.tolist() == [0, 1, 2, 3, -1, 0, 1, 2, -1, -1]
    assert groups.parameter_of.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_tensors_are_one_row_each(granularity):
    groups = Groups(SHAPES, granularity, num_total=62)
    assert groups.counts.tolist() == [28, 4, 15, 12, 3]
    assert groups.indices.tolist() == [-1] * 5


def test_a_role_is_one_group_in_all_layers():
    groups = Groups(SHAPES, "role", num_total=62)
    assert groups.num_groups == 4
    assert groups.counts.tolist() == [28, 7, 15, 12]
    assert groups.indices.tolist() == [-1] * 4
    rows = groups.to_table({"slope": np.arange(4.0)}, {}).to_pylist()
    assert [row["role"] for row in rows] == ["linear", "bias", "conv1d", "experts"]
    assert [row["parameter"] for row in rows] == ["linear", None, "conv1d", "experts"]
    assert [row["layer"] for row in rows] == [0, None, 1, 1]


def test_table():
    groups = Groups(SHAPES, "row", num_total=62)
    table = groups.to_table({"slope": np.arange(10.0)}, {"note": "x"})
    assert table.column_names == ["parameter", "role", "layer", "depth", "index", "count", "slope"]
    assert table.to_pylist()[6] == {
        "parameter": "conv1d",
        "role": "conv1d",
        "layer": 1,
        "depth": 1.0,
        "index": 1,
        "count": 5,
        "slope": 6.0,
    }
    assert table.schema.metadata[b"note"] == b"x"


def test_candidates_are_everything_but_the_head(bert):
    groups = build_groups(bert, "row")
    assert groups.always_train == groups.new == ("classifier.weight", "classifier.bias")
    base = sum(p.numel() for name, p in bert.named_parameters() if not name.startswith("classifier"))
    assert groups.num_total == groups.counts.sum() == base


def test_a_frozen_new_head_is_no_candidate_either(bert):
    groups = build_groups(bert, "tensor", always_train=[])
    assert groups.always_train == ()
    assert groups.new == ("classifier.weight", "classifier.bias")
    assert not {info.name for info in groups.parameters} & set(groups.new)


def test_include_exclude_and_always_train(bert):
    groups = build_groups(
        bert, "tensor", always_train=["*pooler*"], include=["*layer.1*", "*pooler*"], exclude=["*.bias"]
    )
    names = {info.name for info in groups.parameters}
    assert names
    assert all("layer.1" in name and not name.endswith("bias") for name in names)
    assert groups.always_train == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert groups.num_total == build_groups(bert, "tensor").num_total, "a fraction is one of the whole base model"


@pytest.mark.parametrize("pattern", ["lm_head.weight", "*lm_head*", "transformer.wte.weight", "*wte*"])
def test_a_tied_weight_is_matched_by_each_of_its_names(pattern):
    tied, model = "transformer.wte.weight", make_gpt2()
    assert [info.name for info in build_groups(model, "row", include=[pattern]).parameters] == [tied]
    assert tied not in [info.name for info in build_groups(model, "row", exclude=[pattern]).parameters]
    assert build_groups(model, "row", always_train=[pattern]).always_train == (tied,)


def test_a_pattern_that_matches_nothing_names_its_field(bert):
    for field in ("include", "exclude", "always_train"):
        with pytest.raises(AdapeftError, match=f"select.{field}: the pattern 'qurey' matches no parameter"):
            build_groups(bert, "tensor", **{field: ["qurey"]})


def test_meta_models_have_groups_but_no_fingerprint(bert):
    with torch.device("meta"):
        empty = type(bert)(bert.config)
    there, here = build_groups(empty, "row"), build_groups(bert, "row")
    assert (there.parameters, there.num_groups) == (here.parameters, here.num_groups)
    assert there.fingerprint == ""
    assert here.fingerprint

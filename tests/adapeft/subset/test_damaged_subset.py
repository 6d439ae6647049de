"""Tests that damaged subsets either load completely or are refused by name."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapeft.files.artifact import save_tensors
from adapeft.parts.adapter import Adapter
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from tests.support.damage import check, damaged_safetensors, examples

SUBSET = Subset(
    {
        "layers.0.rows": Rows((4, 6), torch.tensor([0, 5]), 1),
        "layers.1.elements": Elements((3, 5), torch.tensor([1, 7, 14])),
        "whole": Whole((9,)),
        "lora": Lora((4, 6), 0, 2, 4.0),
        "adapter": Adapter((6,), 2),
    },
    always_train=("head", "norm"),
    new=("head",),
    choice=Choice(
        **{
            **{"method": "adapeft", "granularity": "row", "budget": 20, "value": 2.5, "bound": 2.5, "gap": 0.0},
            **{
                "status": "optimal",
                "reach": 0.25,
                "num_groups": 9,
                "num_chosen": 3,
                "seed": 0,
                "fingerprint": "f" * 64,
            },
            "config": "model: {name: base, task: causal-lm}\ndata: {train: train.txt}\n",
        }
    ),
)


def whole(subset: Subset) -> None:
    """Use every property of the subset."""
    assert 0 <= subset.count < 2**63
    for name, part in subset.parts.items():
        part.check("again", name)
        assert not part.is_indexed or part.indices.dtype == torch.int64
        assert all(isinstance(size, int) for size in part.shape)
    assert all(isinstance(name, str) for name in (*subset.parts, *subset.always_train, *subset.new))


def saved(folder, what):
    what.save(folder / "in" / "damaged.safetensors")
    return folder / "in" / "damaged.safetensors"


def test_subsets(tmp_path):
    path = saved(tmp_path, SUBSET)

    @examples(300)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: Subset.load(path), path)
        if found is not None:
            whole(found)
            check(lambda: found.summary(), path, names="subset")

    run()


def loaded(path, stored: torch.Tensor) -> Subset | None:
    """Return a subset of a 3 x 5 matrix with these stored indices as it loads, or None if it is refused by name."""
    parts = {"p": {"kind": "elements", "shape": [3, 5], "dim": 0}}
    save_tensors(path, "subset", {"p": stored}, {"parts": parts, "always_train": [], "new": []})
    return check(lambda: Subset.load(path), path)


def test_indices(tmp_path):
    """Of arbitrary indices, only those that ascend within the parameter load."""
    path = tmp_path / "in" / "damaged.safetensors"
    dtypes = st.sampled_from([torch.int32, torch.int64, torch.int16, torch.float32, torch.bool])

    @examples(100)
    @given(st.lists(st.integers(-2, 16), max_size=4), dtypes)
    def run(indices: list[int], dtype: torch.dtype) -> None:
        ascending = indices == sorted(set(indices)) and set(indices) <= set(range(15))
        found = loaded(path, torch.tensor(indices, dtype=dtype))
        assert (found is not None) == (ascending and dtype in (torch.int32, torch.int64))

    run()


def test_gaps(tmp_path):
    """Of arbitrary gaps, only those that end within the parameter load."""
    path = tmp_path / "in" / "damaged.safetensors"

    @examples(100)
    @given(st.lists(st.one_of(st.integers(0, 6), st.integers(250, 255)), max_size=4))
    def run(gaps: list[int]) -> None:
        found = loaded(path, torch.tensor(gaps, dtype=torch.uint8))
        assert (found is not None) == (sum(gap + 1 for gap in gaps) <= 15)

    run()

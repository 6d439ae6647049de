"""Tests of subsets on disk and of the models that they fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_tensors
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset

SUBSET = Subset(
    {
        "rows": Rows((4, 6), torch.tensor([0, 5]), 1),
        "elements": Elements((3, 5), torch.tensor([1, 7, 14])),
        "whole": Whole((9,)),
    },
    always_train=("head", "norm"),
    new=("head",),
    choice=Choice(method="adapeft", budget=20, gap=0.5, fingerprint="f"),
)


@pytest.fixture
def path(tmp_path):
    SUBSET.save(tmp_path / "subset.safetensors")
    return tmp_path / "subset.safetensors"


def rewrite(path, change):
    """Save the file again after ``change(indices, description)``."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["adapeft"])
        indices = {name: file.get_tensor(name) for name in ("rows", "elements")}
    kind, _ = description.pop("kind"), description.pop("provenance")
    change(indices, description)
    save_tensors(path, kind, indices, description)


def test_counts():
    assert {name: part.count for name, part in SUBSET.parts.items()} == {"rows": 8, "elements": 3, "whole": 9}
    assert SUBSET.count == 20, "the head is outside the budget"


def test_comes_back(path):
    loaded = Subset.load(path)
    assert (loaded.always_train, loaded.new) == (SUBSET.always_train, SUBSET.new)
    assert SUBSET.choice.recorded().items() <= loaded.choice.recorded().items()
    assert "torch" in loaded.choice.provenance["versions"]
    assert list(loaded.parts) == list(SUBSET.parts)
    for name, part in SUBSET.parts.items():
        again = loaded.parts[name]
        assert again == part
        assert not again.is_indexed or again.indices.dtype == torch.int64


def test_indices_are_stored_as_gaps(path):
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("elements").dtype == torch.uint8
        assert sorted(file.keys()) == ["elements", "rows"]


def test_indices_of_older_files_are_read_as_they_are(path):
    plain = {name: part.indices.int() for name, part in SUBSET.parts.items() if part.is_indexed}
    rewrite(path, lambda tensors, _: tensors.update(plain))
    assert Subset.load(path).parts == SUBSET.parts


def test_nothing_is_left_behind(path):
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file(tmp_path):
    with pytest.raises(AdapeftError, match=r"none.safetensors: no such file; expected a subset"):
        Subset.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapeftError, match="is not a subset, or it is truncated"):
        Subset.load(path)


def test_foreign_files(path):
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(AdapeftError, match="not one of adapeft's: expected a subset"):
        Subset.load(path)
    save_tensors(path, "delta", {}, {})
    with pytest.raises(AdapeftError, match="another kind of artifact: expected a subset"):
        Subset.load(path)


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("rows", [0, 6]),
        ("rows", [-1, 2]),
        ("rows", [3, 3]),
        ("elements", [7, 1]),
        ("elements", [1, 15]),
        ("elements", [[1, 2]]),
    ],
)
def test_indices_that_do_not_fit(path, name, indices):
    rewrite(path, lambda tensors, _: tensors.update({name: torch.tensor(indices, dtype=torch.int32)}))
    with pytest.raises(AdapeftError, match=f"the indices of '{name}' must be 1-D, ascending and from 0 to"):
        Subset.load(path)


@pytest.mark.parametrize(
    ("name", "kind"), [("rows", "tensor"), ("whole", "rows"), ("whole", "elements"), ("rows", "columns")]
)
def test_kinds_that_do_not_go_with_the_indices(path, name, kind):
    rewrite(path, lambda _, description: description["parts"][name].update(kind=kind))
    with pytest.raises(AdapeftError, match=f"'{name}' has kind '{kind}', which does not match its indices"):
        Subset.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda description: description.pop("parts"),
        lambda description: description.pop("new"),
        lambda description: description["parts"]["rows"].pop("shape"),
        lambda description: description["parts"]["rows"].update(shape=7),
        lambda description: description["parts"]["rows"].update(dim=2),
        lambda description: description["parts"]["elements"].update(shape=["x", 6]),
        lambda description: description.update(parts=[1]),
    ],
)
def test_a_damaged_description(path, change):
    rewrite(path, lambda _, description: change(description))
    with pytest.raises(AdapeftError, match="damaged description of a subset"):
        Subset.load(path)


def test_fits(bert):
    name = "bert.encoder.layer.0.attention.self.query.weight"
    Subset({name: Whole((12, 12))}, always_train=("classifier.bias",)).check_fits(bert)
    with pytest.raises(AdapeftError, match=r"query.weight' has shape .*: the subset was chosen for another model"):
        Subset({name: Whole((12, 13))}).check_fits(bert)
    with pytest.raises(AdapeftError, match=r"'classifier.bais', which is not in this model. Did you mean"):
        Subset({}, always_train=("classifier.bais",)).check_fits(bert)


@pytest.mark.parametrize(
    "part",
    [
        Whole((4, 6)),
        Rows((4, 6), torch.tensor([1, 3]), 0),
        Rows((4, 6), torch.tensor([0, 5]), 1),
        Elements((4, 6), torch.tensor([0, 7, 8, 23])),
    ],
)
@pytest.mark.parametrize("cut", [0, 5, 12, 24])
def test_the_mask_of_a_slice_is_a_slice_of_the_mask(part, cut):
    whole = torch.zeros(4, 6, dtype=torch.bool)
    if part.kind == "tensor":
        whole[:] = True
    elif part.kind == "rows":
        whole.index_fill_(part.dim, part.indices, True)
    else:
        whole.view(-1)[part.indices] = True
    pieces = [part.mask(0, cut), part.mask(cut)]
    assert torch.equal(torch.cat(pieces), whole.flatten())

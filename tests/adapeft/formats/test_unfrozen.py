"""Patterns for axolotl match exactly the trained parameters; parts that they cannot express are rejected by name."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from adapeft import AdapeftError
from adapeft.formats.unfrozen import save_unfrozen_parameters, unfrozen_parameters
from adapeft.parts.dense import Dense
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.oracles.leaves import inside
from tests.oracles.merged import random_delta
from tests.oracles.parts import MODELS
from tests.support.tiny import make_bert

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def unfrozen(patterns: list[str], name: str, shape: torch.Size) -> torch.Tensor:
    """Return the bool mask of elements that axolotl trains. Dots are literal, ranges are along the first dimension."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for pattern in patterns:
        stem, bracket, span = pattern.partition("[")
        if re.match(stem.replace(".", r"\."), name):
            start, _, end = span.rstrip("]").partition(":") if bracket else ("0", "", str(len(mask)))
            mask[int(start) : int(end)] = True
    return mask


@pytest.mark.parametrize("name", MODELS)
def test_they_match_what_is_trained_and_nothing_else(name, tmp_path):
    model = MODELS[name]()
    parameters = dict(model.named_parameters())
    parts = {}
    for position, (key, parameter) in enumerate(parameters.items()):
        shape = tuple(parameter.shape)
        runs = torch.tensor([index for index in (0, 1, 4, 6, 7, 8, len(parameter) - 1) if index < shape[0]]).unique()
        kind = ("tensor", "rows", "")[position % 3]
        if kind:
            parts[key] = Whole(shape) if kind == "tensor" else Rows(shape, runs)
        if kind == "rows" and len(shape) == 1:
            parts[key] = Elements(shape, runs)
    always = ("classifier.weight",) if name == "bert" else ()
    parts = {key: part for key, part in parts.items() if not key.startswith("classifier")}
    subset = Subset(parts, always_train=always, new=always)
    path = save_unfrozen_parameters(subset, tmp_path / "unfrozen.yaml")
    assert "weight_decay: 0" in path.read_text()
    patterns = yaml.safe_load(path.read_text())["unfrozen_parameters"]
    for key, parameter in parameters.items():
        expected = torch.ones(parameter.shape).bool() if key in always else inside(parts.get(key), parameter.shape)
        assert torch.equal(unfrozen(patterns, key, parameter.shape), expected), key
    with pytest.raises(AdapeftError, match="already exists"):
        save_unfrozen_parameters(subset, path)


def test_a_delta_and_the_signs_of_its_ranges(tmp_path):
    parts = {QUERY: Rows((12, 12), torch.tensor([2, 3, 11])), "bert.pooler.dense.bias": Whole((12,))}
    delta = random_delta(make_bert(), parts)
    assert unfrozen_parameters(delta) == [
        f"^{QUERY}$[2:4]",
        f"^{QUERY}$[11:12]",
        "^bert.pooler.dense.bias$",
        "^classifier.weight$",
        "^classifier.bias$",
    ]


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        (
            QUERY,
            Elements((12, 12), torch.tensor([3])),
            f"'{QUERY}' is trained as elements: unfrozen_parameters",
        ),
        (QUERY, Rows((12, 12), torch.tensor([3]), 1), f"'{QUERY}' is trained as rows along dimension 1"),
        (QUERY, Lora((12, 12), 0, 2, 2.0), "is trained as lora: .* select.groups=tensor"),
        (QUERY, Dense((12, 12)), "is trained as dense"),
        (QUERY, Rows((12, 12), torch.tensor([], dtype=torch.long)), "nothing is trained"),
        ("a+b", Whole((12,)), "has special characters of patterns in its name"),
    ],
)
def test_what_patterns_cannot_say_is_refused_by_name(name, part, message, tmp_path):
    with pytest.raises(AdapeftError, match=message):
        save_unfrozen_parameters(Subset({name: part}), tmp_path / "unfrozen.yaml")
    assert not list(tmp_path.iterdir())

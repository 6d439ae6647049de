"""One suite that every method passes at every granularity; test_rule_methods.py has those that decide in training."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import adapeft
from adapeft.choose.subset import Subset
from adapeft.config import Granularity
from adapeft.errors import AdapeftError
from adapeft.measure.groups import build_groups
from adapeft.methods import METHODS, RuleMethod, get_method
from tests.tiny import make_batches, make_bert, make_gpt2

CASES = [
    pytest.param(make, method, granularity, id=f"{make.__name__}-{method}-{granularity}")
    for make in (make_bert, make_gpt2)
    for method, found in METHODS.items()
    for granularity in get_args(Granularity)
    if not isinstance(found, RuleMethod)
]
BUDGET = 313
KINDS = {"tensor": {"tensor"}, "row": {"tensor", "rows"}, "element": {"elements"}}


@pytest.mark.parametrize(("make", "method", "granularity"), CASES)
def test_conforms(make, method, granularity, tmp_path):
    model = make()
    batches = make_batches(model)

    def select():
        return adapeft.select(model, batches, method=method, groups=granularity, budget=BUDGET, seed=4)

    subset = select()
    # Within the budget, and using what of it the cheapest group or every positive element can use.
    assert 0.9 * BUDGET < subset.count <= BUDGET
    assert {part.kind for part in subset.parts.values()} <= KINDS[granularity]
    candidates = {info.name: info.shape for info in build_groups(model, granularity).parameters}
    assert all(candidates[name] == part.shape for name, part in subset.parts.items())
    said = {"method": method, "granularity": granularity, "budget": BUDGET, "seed": 4}
    assert said.items() <= subset.description.items()

    again = select()
    assert repr(again.parts) == repr(subset.parts)
    subset.save(tmp_path / "subset.safetensors")
    loaded = Subset.load(tmp_path / "subset.safetensors")
    assert repr(dict(loaded.parts)) == repr(dict(subset.parts))

    new = sum(dict(model.named_parameters())[name].numel() for name in subset.new)
    with torch.no_grad():
        before = model.eval()(**batches[0]).logits
        adapeft.attach(model, loaded)
        torch.testing.assert_close(model(**batches[0]).logits, before)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == subset.count + new
    model(**batches[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable)


@pytest.mark.parametrize("method", METHODS)
def test_says_what_it_is(method):
    found = get_method(method)
    assert found.name == method
    assert all((found.family, found.summary, found.source))


def test_an_unknown_method():
    with pytest.raises(AdapeftError, match=r"select.method = 'adapefd': no such method. Did you mean 'adapeft'"):
        get_method("adapefd")

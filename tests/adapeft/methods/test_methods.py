"""Tests that every method passes at every granularity; test_rule_methods.py has the methods with a rule."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch

import adapeft
from adapeft.choose.knapsack import chosen_of
from adapeft.config.experiments import PAPER
from adapeft.errors import AdapeftError
from adapeft.measure.groups import build_groups
from adapeft.methods.options import OPTIONS
from adapeft.methods.registry import METHODS, RuleMethod, get_method
from adapeft.sections.select import Granularity
from adapeft.subset.subset import Subset
from tests.support.tiny import make_batches, make_bert, make_gpt2

PLAIN = [
    (method, granularity, {})
    for method, found in METHODS.items()
    for granularity in get_args(Granularity)
    if not isinstance(found, RuleMethod) and granularity in OPTIONS[method].granularities
]
FORMS = {
    "paper": ("adapeft", "role", {key: value for key, value in PAPER.items() if key != "groups"} | {"probe_steps": 6}),
    "greedy": ("adapeft", "row", {"solver": "greedy"}),
    "joint": ("adapeft", "row", {"joint": True}),
    "without-a-reach": ("adapeft", "element", {"reach": "inf"}),
    "one-by-one": ("adapeft", "element", {"joint": False}),
    "mixed": ("adapeft", "row", {"options": ["row", "tensor", "lora"]}),
    "per-tensor": ("sam", "element", {"scope": "tensor"}),
    "houlsby": ("adapter", "tensor", {"placement": "houlsby"}),
}
"""Forms of methods that keys of ``select`` make."""
TRANSPOSED = {("adapeft", "row"), ("adapeft", "element"), ("lora", "tensor"), ("adapter", "tensor"), ("sam", "element")}
"""Cases that are fast tests with GPT-2 as well, whose matrices are transposed and whose embeddings are tied."""


def case_of(make, case, form):
    is_fast = (make is make_bert and form != "paper") or (form is None and case[:2] in TRANSPOSED)
    name = "-".join(filter(None, (make.__name__, *case[:2], form)))
    return pytest.param(make, *case, id=name, marks=[] if is_fast else pytest.mark.slow)


CASES = [
    case_of(make, case, form)
    for make in (make_bert, make_gpt2)
    for form, case in [*((None, case) for case in PLAIN), *FORMS.items()]
]
BUDGET = 700
KINDS = {"tensor": {"tensor"}, "row": {"tensor", "rows"}, "element": {"elements"}, "role": {"tensor"}}
ADDED_KINDS = {"lora": {"lora"}, "adapter": {"adapter"}}


@pytest.mark.parametrize(("make", "method", "granularity", "options"), CASES)
def test_conforms(make, method, granularity, options, tmp_path):
    model = make()
    batches = make_batches(model)

    def select():
        return adapeft.select(
            model, batches, method=method, groups=granularity, budget=BUDGET, seed=4, warmup_steps=4, **options
        )

    subset = select()
    found = get_method(method)
    if method == "bitfit":  # exactly the biases
        biases = [name for name, _ in model.named_parameters() if name.endswith("bias") and name not in subset.new]
        assert sorted(subset.parts) == sorted(biases)
        assert subset.count <= BUDGET
    elif found.is_budgeted:
        # Within the budget; unused is only what no other group, positive element or further rank could use.
        assert (0.3 if granularity == "role" else 0.5) * BUDGET < subset.count <= BUDGET
    else:
        assert subset.count == int(build_groups(model, granularity).counts.sum())
    kinds = KINDS[granularity] | set(options.get("options", ()))
    assert {part.kind for part in subset.parts.values()} <= ADDED_KINDS.get(method, kinds)
    groups = build_groups(model, granularity)
    candidates = {info.name: info.shape for info in groups.parameters}
    if granularity == "role":  # all layers or none
        roles = {info.role for info in groups.parameters if info.name in subset.parts}
        assert subset.parts.keys() == {info.name for info in groups.parameters if info.role in roles}
        assert len(subset.parts) > len(roles) == (chosen_of(groups, subset) == groups.counts).sum()
    assert all(candidates[name] == part.shape for name, part in subset.parts.items() if part.kind != "adapter")
    said = {"method": method, "granularity": granularity, "seed": 4}
    assert subset.choice.budget == (BUDGET if found.is_budgeted else subset.count)
    assert said.items() <= subset.choice.recorded().items()

    again = select()
    assert repr(again.parts) == repr(subset.parts)
    subset.save(tmp_path / "subset.safetensors")
    loaded = Subset.load(tmp_path / "subset.safetensors")
    assert repr(dict(loaded.parts)) == repr(dict(subset.parts))

    new = sum(dict(model.named_parameters())[name].numel() for name in subset.new)
    with torch.no_grad():
        before = model.eval()(**batches[0]).logits
        adapeft.attach(model, loaded)
        torch.testing.assert_close(model(**batches[0]).logits, before, rtol=0, atol=0)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == subset.count + new
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for batch in batches[:2]:  # LoRA's A and an adapter's down projection change only from the second step on
        model(**batch).loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
    check_what_is_shipped(make, model.eval(), batches[0], subset)


def check_what_is_shipped(make, trained, batch, subset):
    """Check that the delta turns the base into the trained model and is p-sparse, counted entry by entry."""
    delta = adapeft.delta(trained)
    assert delta.count == subset.count
    base, merged = make().eval(), make().eval()
    delta.apply(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, trained(**batch).logits, rtol=1e-4, atol=1e-5)
    differing = {
        name: int((parameter != dict(merged.named_parameters())[name]).sum())
        for name, parameter in base.named_parameters()
        if name not in subset.new
    }
    for name, part in subset.parts.items():
        if part.kind == "adapter":
            continue  # it leaves all weights unchanged
        if part.kind == "lora":  # p-sparse with respect to the model that keeps the product next to the weight
            difference = merged.get_parameter(name) - base.get_parameter(name)
            assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= part.rank
        else:
            assert differing[name] <= part.count
    others = {name: count for name, count in differing.items() if name not in subset.parts}
    assert not any(others.values())


@pytest.mark.parametrize("method", METHODS)
def test_says_what_it_is(method):
    found = get_method(method)
    assert found.name == method
    assert all((found.family, found.summary, found.cost, found.source))
    assert OPTIONS[method] is found.options, "the config knows it"


def test_an_unknown_method():
    with pytest.raises(AdapeftError, match=r"select.method = 'adapefd': no such method. Did you mean 'adapeft'"):
        get_method("adapefd")


def test_bitfit_refuses_what_is_less_than_the_biases():
    model = make_bert()
    biases = sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("bias") and not n.startswith("classifier")
    )
    with pytest.raises(AdapeftError, match=f"trains all {biases:,} bias terms. Raise the budget to {biases}"):
        adapeft.select(model, make_batches(model), method="bitfit", budget=biases - 1)
    with pytest.raises(AdapeftError, match="no candidate is a bias"):
        adapeft.select(model, make_batches(model), method="bitfit", budget=500, exclude="*bias")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "bitfit", "groups": "row"}, "select.groups = row: bitfit chooses by tensor"),
        (
            {"method": "random", "scope": "tensor"},
            "select.scope = tensor: is an option of the methods magnitude, child-",
        ),
        ({"method": "sam", "groups": "row", "scope": "tensor"}, "select.scope = tensor"),
        ({"method": "sam", "solver": "greedy"}, "select.solver = greedy: sam by element does not solve a knapsack"),
        (
            {"method": "sam", "groups": "row", "joint": True},
            "select.joint = true: is an option of method adapeft, and select.method is",
        ),
    ],
)
def test_keys_that_do_not_go_together(options, said):
    with pytest.raises(AdapeftError, match=re.escape(said)):
        adapeft.select(make_bert(), [], **options)

"""Tests of methods that decide during training, through the library: a common suite and the refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import adapeft
from adapeft.errors import AdapeftError
from adapeft.methods.registry import METHODS, RuleMethod
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import changed, logits, weights
from tests.support.tiny import make_batches, make_bert, make_gpt2

BUDGET = 313
NAMES = [name for name, method in METHODS.items() if isinstance(method, RuleMethod)]


def choose(model, method, **options):
    return adapeft.select(model, make_batches(model), method=method, budget=BUDGET, seed=4, **options)


def fit(model, num_steps=4, after_step=lambda model: None):
    optimizer = torch.optim.AdamW(adapeft.parameter_groups(model, 3e-2, 0.1))
    adapeft.follow_rule(model, optimizer, num_steps=num_steps)
    model.train()
    for batch in make_batches(model)[:num_steps]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("method", NAMES)
def test_conforms(make, method, tmp_path):
    model, base = make(), make()
    subset = choose(model, method, exclude=["*word_embeddings*"] if make is make_bert else ["*wpe*"])
    said = {"method": method, "granularity": "element", "seed": 4}
    assert said.items() <= subset.choice.recorded().items()
    subset.save(tmp_path / "subset.safetensors")
    before = logits(model)
    adapeft.attach(model, Subset.load(tmp_path / "subset.safetensors"))
    torch.testing.assert_close(logits(model), before)
    torch.manual_seed(0)
    fit(model)
    found = adapeft.delta(model)
    found.save(tmp_path / "delta.safetensors")

    before = weights(base)
    adapeft.Delta.load(tmp_path / "delta.safetensors").apply(base)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)
    masks = {name: mask for name, mask in changed(before, weights(base)).items() if name not in subset.new}
    assert not any(mask.any() for name, mask in masks.items() if name not in subset.parts)
    count = sum(int(mask.sum()) for mask in masks.values())
    if METHODS[method].is_budgeted:
        # Mixout draws the kept entries before it is known which get a gradient in these few steps.
        assert (0.2 if method == "mixout-reset" else 0.9) * BUDGET < count <= found.count <= BUDGET
    else:
        assert count > 2 * BUDGET

    again = make()
    adapeft.attach(again, choose(again, method, exclude=["*word_embeddings*"] if make is make_bert else ["*wpe*"]))
    torch.manual_seed(0)
    fit(again)
    other = adapeft.delta(again)
    assert all(torch.equal(other.changes[name].values, change.values) for name, change in found.changes.items())


@pytest.mark.parametrize("method", [name for name in NAMES if name != "diff-pruning"])
def test_shipping_in_between_changes_no_training(method):
    """The shipped delta is within the budget; the trained values are not."""
    finals, counts = [], []
    for after_step in (lambda model: None, lambda model: counts.append(adapeft.delta(model).count)):
        model = make_bert()
        adapeft.attach(model, choose(model, method))
        torch.manual_seed(0)
        fit(model, after_step=after_step)
        finals.append(adapeft.delta(model))
    assert len(counts) == 4
    assert not METHODS[method].is_budgeted or max(counts) <= BUDGET
    for name, change in finals[0].changes.items():
        assert torch.equal(finals[1].changes[name].values, change.values), name


@pytest.mark.parametrize("method", NAMES)
def test_detaching_gives_the_base_back(method):
    model, untouched = make_bert(), make_bert()
    adapeft.attach(model, choose(model, method))
    fit(model)
    adapeft.detach(model)
    differing = changed(weights(untouched), weights(model))
    assert {name.partition(".")[0] for name, mask in differing.items() if mask.any()} == {"classifier"}
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [
        m.p for m in untouched.modules() if isinstance(m, torch.nn.Dropout)
    ]


def test_mixout_turns_off_dropout_that_is_no_module():
    """OPT's layers keep a probability and call the functional form of dropout."""
    torch.manual_seed(0)
    small = {"vocab_size": 29, "hidden_size": 12, "word_embed_proj_dim": 12, "ffn_dim": 20}
    model = OPTForCausalLM(
        OPTConfig(num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=16, dropout=0.5, **small)
    )
    expected, given = logits(model), [layer.dropout for layer in model.model.decoder.layers]
    adapeft.attach(model, choose(model, "mixout"))
    found = model.train()(**make_batches(model)[0]).logits
    torch.testing.assert_close(found, expected)  # nothing is trained yet, so nothing is mixed
    adapeft.detach(model)
    assert [layer.dropout for layer in model.model.decoder.layers] == given == [0.5, 0.5]


@pytest.mark.parametrize("method", NAMES)
def test_a_delta_needs_the_rule_to_have_been_kept(method):
    model = make_bert()
    adapeft.attach(model, choose(model, method))
    with pytest.raises(AdapeftError, match=f"the rule of {method} was not followed.*call adapeft.follow_rule"):
        adapeft.delta(model)


def test_what_is_not_projected_yet_is_no_delta():
    model = make_bert()
    adapeft.attach(model, choose(model, "diff-pruning"))
    optimizer = torch.optim.AdamW(adapeft.parameter_groups(model, 3e-2, 0.1))
    adapeft.follow_rule(model, optimizer, num_steps=10, step=2)
    with pytest.raises(AdapeftError, match="diff-pruning has not projected yet: 2 of 10 steps"):
        adapeft.delta(model)


def test_an_optimizer_that_leaves_leaves_out_is_refused():
    model = make_bert()
    adapeft.attach(model, choose(model, "child-pruning"))
    head = [parameter for name, parameter in model.named_parameters() if name.startswith("classifier")]
    with pytest.raises(AdapeftError, match=r"does not train all leaves of 'bert\.embeddings"):
        adapeft.follow_rule(model, torch.optim.AdamW(head), num_steps=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "sam", "rule": {"penalty": 1}},
            "select.penalty = 1: is an option of method diff-pruning, and select.method is sam",
        ),
        (
            {"method": "mixout", "rule": {"probabilty": 0.5}},
            "select.probabilty: unknown key. Did you mean 'select.probability'",
        ),
        (
            {"method": "mixout", "rule": {"penalty": 0.5}},
            "select.penalty = 0.5: is an option of method diff-pruning, and select.method is mixout",
        ),
        (
            {"method": "mixout", "rule": {"probability": 1.5}},
            r"select.probability = 1.5: should be less than 1 \(probability that a weight",
        ),
        (
            {"method": "child-pruning", "rule": {"projection_interval": 0}},
            "select.projection_interval = 0: should be greater",
        ),
        ({"method": "child-pruning", "groups": "row"}, "groups = row: child-pruning chooses by element"),
        ({"method": "child-pruning", "rule": 3}, "select.rule = 3: should be a mapping of the method's own options"),
    ],
)
def test_options_that_the_method_does_not_have(options, message, bert):
    with pytest.raises(AdapeftError, match=message):
        adapeft.select(bert, make_batches(bert), **options)


def test_a_subset_whose_rule_is_gone_is_refused(bert):
    subset = choose(bert, "mixout")
    damaged = Subset(subset.parts, subset.always_train, subset.new)
    with pytest.raises(AdapeftError, match="dense parts is missing or unknown"):
        adapeft.attach(bert, damaged)
    assert attachment_of(adapeft.attach(bert, subset)).rule.step == 0

"""Tests of attaching: trainable parameters, optimizer contents, tied weights, refusals, and detaching."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from adapeft import AdapeftError, attach, detach
from adapeft.model.fingerprint import fingerprint_model
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import SUBSETS, changed, densify, gather, logits, make_subset, train, weights
from tests.support.tiny import make_batches, make_bert, make_gpt2

MODELS = {"bert": make_bert, "gpt2": make_gpt2}
WTE = "transformer.wte.weight"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=29,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("kind", SUBSETS)
@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_subset_is_trainable(name, kind):
    model = MODELS[name]()
    base, before = weights(model), logits(model)
    subset = make_subset(model, kind)
    assert attach(model, subset) is model
    new = sum(base[name].numel() for name in subset.always_train)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == subset.count + new
    assert set(attachment_of(model).trained) == {*subset.parts, *subset.always_train}
    torch.testing.assert_close(logits(model), before)
    optimizer = train(model)
    assert not torch.allclose(logits(model), before)
    state = sum(value.numel() * value.element_size() for entry in optimizer.state.values() for value in entry.values())
    assert state == 8 * (subset.count + new) + 4 * len(trainable(model)), "two float32 moments, and a step a leaf"
    frozen = {name: value for name, value in weights(model).items() if name in base and name not in trainable(model)}
    assert not any(mask.any() for mask in changed({name: base[name] for name in frozen}, frozen).values())
    assert all(model.get_parameter(name).grad is None for name in frozen)


@pytest.mark.parametrize(
    "part",
    [
        Rows((29, 12), torch.tensor([1, 5, 28])),
        Elements((29, 12), torch.arange(3, 348, 7)),
    ],
    ids=["rows", "elements"],
)
def test_a_tied_weight_has_one_leaf_in_both_places(part):
    model = attach(make_gpt2(), Subset({WTE: part}))
    leaf = attachment_of(model).trained[WTE]
    assert model.transformer.wte.weight_leaf is leaf
    assert model.lm_head.weight_leaf is leaf
    assert len(trainable(model)) == 1
    with torch.no_grad():
        leaf.copy_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(4)))
    oracle = make_gpt2()
    with torch.no_grad():
        oracle.transformer.wte.weight += densify(part, leaf.detach())
    torch.testing.assert_close(logits(model), logits(oracle))
    batch = make_batches(model)[0]
    model(**batch).loss.backward()
    oracle(**batch).loss.backward()
    torch.testing.assert_close(leaf.grad, gather(part, oracle.transformer.wte.weight.grad))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_a_real_mixture(implementation):
    model = make_mixtral().eval()
    model.set_experts_implementation(implementation)
    oracle = copy.deepcopy(model)
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    parts = {
        names[0]: Elements(shapes[names[0]], torch.arange(0, oracle.get_parameter(names[0]).numel(), 5)),
        names[1]: Rows(shapes[names[1]], torch.tensor([0, 2])),
    }
    attach(model, Subset(parts))
    leaves = attachment_of(model).trained
    with torch.no_grad():
        for name, part in parts.items():
            leaves[name].normal_()
            oracle.get_parameter(name).add_(densify(part, leaves[name]))
    ids = torch.arange(1, 21).view(2, 10)
    ours, expected = model(input_ids=ids, labels=ids), oracle(input_ids=ids, labels=ids)
    torch.testing.assert_close(ours.logits, expected.logits)
    ours.loss.backward()
    expected.loss.backward()
    for name, part in parts.items():
        torch.testing.assert_close(leaves[name].grad, gather(part, oracle.get_parameter(name).grad))
        assert leaves[name].grad.abs().sum() > 0


def test_gradient_checkpointing_of_the_model_changes_nothing():
    losses, grads = [], []
    for checkpointing in (False, True):
        model = attach(make_bert(), make_subset(make_bert(), "mixed"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        loss = model.train()(**make_batches(model)[0]).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([leaf.grad for leaf in attachment_of(model).trained.values()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", SUBSETS)
def test_detach_gives_the_base_back(kind):
    model, untouched = make_bert(), make_bert()
    model.bert.pooler.dense.bias.requires_grad_(False)
    attach(model, make_subset(model, kind))
    train(model)
    detach(model)
    new = ("classifier.weight", "classifier.bias")
    differing = changed(weights(untouched), weights(model))
    assert {name for name, mask in differing.items() if mask.any()} == set(new), "a new head has no base"
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert set(weights(model)) - set(trainable(model)) == {"bert.pooler.dense.bias"}
    attach(model, make_subset(model, kind))


def test_a_bfloat16_base_comes_back_bit_for_bit():
    model = make_bert().bfloat16()
    base = weights(model)
    attach(model, Subset({name: Whole(tuple(value.shape)) for name, value in base.items()}))
    train(model)
    detach(model)
    assert not any(mask.any() for mask in changed(base, weights(model)).values())


def test_the_attached_state_dict_is_the_base_and_the_leaves():
    model = make_bert()
    keys = set(model.state_dict())
    subset = make_subset(model, "element")
    attach(model, subset)
    assert set(model.state_dict()) - keys == {f"{name}_leaf" for name in subset.parts}


NAME = "bert.pooler.dense.bias"


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (Subset({"bert.poler.dense.bias": Whole((12,))}), "which is not in this model.*bert.pooler"),
        (Subset({}, ("bert.head",)), "trains 'bert.head', which is not in this model"),
        (Subset({NAME: Whole((13,))}), r"has shape \(13,\) in the subset, but \(12,\) in this model"),
        (Subset({NAME: Whole((12,))}, choice=Choice(fingerprint="f" * 64)), "ffffffffffff.*Load the base"),
    ],
)
def test_a_subset_of_another_model_is_refused_and_nothing_is_touched(bert, subset, message):
    with pytest.raises(AdapeftError, match=message):
        attach(bert, subset)
    assert len(trainable(bert)) == len(list(bert.parameters()))
    with pytest.raises(AdapeftError, match="no subset is attached"):
        detach(bert)


def test_the_fingerprint_of_a_subset_is_that_of_its_base(bert):
    new = ("classifier.weight", "classifier.bias")
    chosen = Subset({NAME: Whole((12,))}, new, new, Choice(fingerprint=fingerprint_model(bert, new)))
    with torch.no_grad():
        bert.classifier.weight.add_(1)  # the base is the same with another seed of the new head
    detach(attach(bert, chosen))
    with torch.no_grad():
        bert.bert.pooler.dense.weight[0].add_(1)
    with pytest.raises(AdapeftError, match="chosen for a base model with fingerprint"):
        attach(bert, chosen)


def test_attaching_twice_is_refused(bert):
    attach(bert, make_subset(bert, "row"))
    with pytest.raises(AdapeftError, match="already has a subset"):
        attach(bert, make_subset(bert, "row"))

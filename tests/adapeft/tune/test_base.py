"""Tests of switching an attached delta off in place: outputs in the context, what comes back, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import adapeft
from adapeft import AdapeftError
from adapeft.parts.adapter import Adapter
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import logits, make_subset, train, weights
from tests.support.tiny import make_batches, make_bert, make_gpt2

QUERY, FIRST = "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.output.dense"


def subsets() -> dict[str, Subset]:
    """Return subsets of every kind on the tiny BERT, without new parameters."""
    shape = tuple(make_bert().get_parameter(QUERY).shape)
    width = make_bert().get_submodule(FIRST).out_features
    kinds = {
        "rows": Rows(shape, torch.tensor([0, 3])),
        "elements": Elements(shape, torch.arange(0, 100, 7)),
        "lora": Lora(shape, 0, 2, 4.0),
        "whole": Whole(shape),
    }
    embeddings = "bert.embeddings.word_embeddings.weight"
    rows = Rows(tuple(make_bert().get_parameter(embeddings).shape), torch.arange(0, 25))
    alone = {kind: Subset({QUERY: part}) for kind, part in kinds.items()}
    bias = {f"{FIRST}.bias": Whole((width,))}
    together = Subset({QUERY: kinds["lora"], FIRST: Adapter((width,), 3), embeddings: rows, **bias})
    return {**alone, "adapter": Subset({FIRST: Adapter((width,), 3)}), "together": together}


def trained(model: nn.Module, subset: Subset) -> nn.Module:
    adapeft.attach(model, subset)
    train(model)
    return model


@pytest.mark.parametrize("kind", subsets())
def test_outputs_are_the_pretrained_ones_inside_and_the_trained_ones_outside(kind):
    model, untouched = trained(make_bert(), subsets()[kind]), logits(make_bert())
    after, values = logits(model), weights(model)
    assert not torch.equal(after, untouched)
    with adapeft.base(model):
        assert torch.equal(logits(model), untouched)
    assert torch.equal(logits(model), after)
    assert all(torch.equal(value, values[name]) for name, value in weights(model).items())
    train(model)  # the subset still trains
    assert not torch.equal(logits(model), after)
    adapeft.delta(model)


@pytest.mark.parametrize("kind", ["row", "element", "tensor", "mixed"])
def test_tied_weights_are_the_pretrained_ones_in_both_places(kind):
    model, untouched = make_gpt2(), logits(make_gpt2())
    trained(model, make_subset(model, kind))
    after = logits(model)
    with adapeft.base(model):
        assert torch.equal(logits(model), untouched)
        assert torch.equal(model.lm_head.weight, make_gpt2().lm_head.weight), "read as an attribute"
    assert torch.equal(logits(model), after)


def test_a_new_head_keeps_its_trained_values():
    model = make_bert()
    subset = make_subset(model, "row")
    trained(model, subset)
    head = model.classifier.weight.clone()
    with adapeft.base(model):
        expected = make_bert()
        expected.classifier.load_state_dict(model.classifier.state_dict())
        assert torch.equal(logits(model), logits(expected))
    assert torch.equal(model.classifier.weight, head)


def test_a_rule_of_dense_parts_is_switched_off():
    model, untouched = make_gpt2(), logits(make_gpt2())
    subset = adapeft.select(model, make_batches(model), method="mixout")
    trained(model, subset)
    with adapeft.base(model):
        assert torch.equal(logits(model), untouched)


def test_running_statistics_are_those_before_training():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    untouched = model.eval()(images).logits.detach()
    bias = "classifier.1.bias"
    adapeft.attach(model, Subset({bias: Whole((2,))}))
    model.train()(images, labels=labels).loss.backward()
    after = model.eval()(images).logits.detach()
    assert not torch.equal(after, untouched), "statistics have moved"
    with adapeft.base(model):
        assert torch.equal(model(images).logits, untouched)
        model.train()(images)  # what it writes into the statistics is discarded
        model.eval()
    assert torch.equal(model(images).logits, after)


@pytest.mark.parametrize("kind", ["whole", "together"])
def test_the_gradient_of_a_step_is_the_same_with_the_reference_in_between(kind):
    """As in DPO: forward, reference, backward; with gradient checkpointing, which computes the forward again."""

    def gradients(with_reference: bool) -> list[torch.Tensor]:
        model = trained(make_bert(), subsets()[kind])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = make_batches(model)[0]
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(**batch).loss
        if with_reference:
            state = torch.get_rng_state()
            with adapeft.base(model):
                assert not model(**batch).logits.requires_grad
            torch.set_rng_state(state)
        loss.backward()
        return [parameter.grad for parameter in attachment_of(model).trained.values()]

    expected, found = gradients(False), gradients(True)
    assert expected
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_autocast_does_not_reuse_its_casts_of_trained_tensors():
    model, plain = trained(make_bert(), subsets()["whole"]), make_bert()
    batch = make_batches(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        after = model.eval()(**batch).logits
        with adapeft.base(model):
            inside = model(**batch).logits
        again = model(**batch).logits
        expected = plain.eval()(**batch).logits
    assert torch.equal(inside, expected)
    assert torch.equal(again, after)


def test_contexts_nest_and_end_after_an_exception():
    model, untouched = trained(make_bert(), subsets()["together"]), logits(make_bert())
    after = logits(model)

    def fail() -> None:
        with adapeft.base(model):
            with adapeft.base(model):
                pass
            assert torch.equal(logits(model), untouched), "the outer context ends it"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(logits(model), after)


@pytest.mark.slow
def test_a_compiled_model_switches_too():
    model, untouched = trained(make_bert(), subsets()["together"]), logits(make_bert())
    after, compiled = logits(model), torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), after)
    with adapeft.base(compiled):
        torch.testing.assert_close(logits(compiled), untouched)
    torch.testing.assert_close(logits(compiled), after)


def test_what_needs_the_trained_values_is_refused_inside(tmp_path):
    model = trained(make_bert(), subsets()["whole"])
    with adapeft.base(model):
        for call in (adapeft.delta, adapeft.detach, lambda one: one.save_pretrained(tmp_path)):
            with pytest.raises(AdapeftError, match="switched off"):
                call(model)
        with torch.enable_grad(), pytest.raises(AdapeftError, match="records gradients"):
            model(**make_batches(model)[0])
    with pytest.raises(AdapeftError, match="no subset is attached"), adapeft.base(make_bert()):
        pass

"""Measuring mode: no dropout, and gradient checkpointing that does not need training mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import adapeft
from adapeft.measure.mode import measuring_mode
from tests.support.tiny import make_batches, make_bert, make_gpt2


def passed(model, batch):
    """Return the loss, the gradients and the number of elements saved for the backward pass."""
    saved = []
    with measuring_mode(model, restore=[]), saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = model(**batch).loss
        kept = sum(saved)
        loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], kept


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_checkpointing_saves_less_and_changes_nothing(make):
    found = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(passed(model, make_batches(model)[0]))
    (loss, gradients, kept), (other_loss, other_gradients, fewer) = found
    assert torch.equal(loss, other_loss), "dropout is off"
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
    assert fewer < 0.5 * kept


def test_dropout_of_a_checkpointed_layer_itself_is_off_and_comes_back():
    model = make_bert().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer = model.bert.encoder.layer[0]
    layer.hidden_dropout = 0.5
    with measuring_mode(model, restore=[]):
        assert layer.training
        assert layer.hidden_dropout == 0.0
        assert not layer.attention.training
    assert layer.hidden_dropout == 0.5
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"groups": "row"},
        {"groups": "row", "measure": "low-rank", "rank": 3},
        {"groups": "element", "measure": "low-rank", "rank": 3},
    ],
    ids=str,
)
def test_the_choice_does_not_depend_on_checkpointing(options):
    plain, checkpointed = make_bert(), make_bert()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    first, second = (
        adapeft.select(model, make_batches(model), budget="20%", warmup_steps=4, **options)
        for model in (plain, checkpointed)
    )
    assert first.parts
    assert dict(first.parts) == dict(second.parts)
    assert first.choice.value == second.choice.value

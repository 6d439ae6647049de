"""Tests that methods with a moving mask train exactly like their dense implementation."""

from __future__ import annotations

import pytest
import torch

import adapeft
from adapeft.methods.diff_pruning.rule import SHUT, expected_open, hard_concrete
from adapeft.methods.mixout.rule import mixed
from adapeft.parts.rule import Place
from adapeft.tune.attachment import attachment_of
from tests.oracles.rules import (
    BUDGET,
    CASES,
    dense_subset,
    dense_values,
    make_model,
    train_densely,
    train_with_adapeft,
)
from tests.support.tiny import make_batches, make_bert, make_gpt2


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("case", CASES)
def test_training_is_the_method_written_down_densely(case, make):
    delta, losses = train_with_adapeft(make, case)
    expected, expected_losses = train_densely(make, case)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    found = dense_values(delta, {name: value.shape for name, value in expected.items()})
    moved = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * moved)
        if name not in delta.new:
            assert torch.equal(found[name] != 0, value != 0)
    if case.startswith(("child-pruning", "diff")):
        assert delta.count == BUDGET
    if case == "mixout-reset":  # some of the drawn entries belong to tokens that do not occur
        assert 0.9 * BUDGET < delta.count <= BUDGET


def test_mixout_is_the_plain_forward_on_average():
    """The mean is that of a linear layer's weight; every draw keeps or drops whole inputs."""
    place, probability = Place("weight", 1), 0.7
    difference = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([mixed(place, difference, probability, 3, step) for step in range(2_000)])
    kept = (draws != 0).float()
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    error = difference.abs() * (probability / (1 - probability) / len(draws)) ** 0.5
    assert ((draws.mean(0) - difference).abs() < 5 * error).all()
    assert torch.equal(mixed(Place("embedding", None), difference, probability, 3, 0), difference)


def test_hard_concrete_gates_have_their_closed_form_expectations():
    logits = torch.linspace(-4, 4, 9, dtype=torch.float64)
    draws = ((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000).unsqueeze(1)  # by quadrature
    gates = hard_concrete(logits, draws)
    torch.testing.assert_close((gates > 0).double().mean(0), expected_open(logits), rtol=0, atol=1e-5)
    # E z = ∫ P(z > t) dt over [0, 1): the stretched gate exceeds t where u exceeds σ(logit((t − l)/(r − l)) − α).
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5).unsqueeze(1) / 10_000
    above = 1 - torch.sigmoid(torch.logit((t + 1.5) / 3) - logits)
    torch.testing.assert_close(gates.mean(0), above.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(hard_concrete(logits), (torch.sigmoid(logits) * 3 - 1.5).clamp(0, 1))


def test_a_shut_gate_is_exactly_its_state_and_has_no_gradient():
    logits = torch.tensor([SHUT - 10, 10 - SHUT], requires_grad=True)
    draws = torch.linspace(1e-6, 1 - 1e-6, 10_001).unsqueeze(1)
    gates = hard_concrete(logits, draws)
    assert torch.equal(gates, torch.tensor([1.0, 0.0]).expand_as(gates))
    gates.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2))


@pytest.mark.parametrize("case", ["mixout", "diff-pruning, structured", "child-pruning"])
def test_no_sum_of_weight_and_leaf_outlives_a_forward(case):
    """Only activations and parameters, which ZeRO-3 removes in between, are saved for the backward pass."""
    model = make_model(make_bert)
    matrices = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1}
    adapeft.attach(model, dense_subset(model, case))
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in parameters and tuple(tensor.shape) in matrices | {s[::-1] for s in matrices}:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**make_batches(model)[0]).loss
    assert kept == []
    loss.backward()


def test_gradient_checkpointing_draws_the_same_again():
    gradients = []
    for checkpointing in (False, True):
        model = make_model(make_gpt2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapeft.attach(model, dense_subset(model, "diff-pruning, structured"))
        with torch.no_grad():
            for name in attachment_of(model).dense:
                attachment_of(model).pieces(name)["difference"].fill_(0.1)
        model(**make_batches(model)[0]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(float(gradient.abs().sum()) for gradient in gradients[0]) > 0

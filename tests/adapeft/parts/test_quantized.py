"""Tests of training next to quantized weights, against dense float64 models with the dequantized weights."""

from __future__ import annotations

import pytest
import torch

import adapeft
from adapeft import AdapeftError, Delta, attach, delta, detach
from adapeft.model.fingerprint import fingerprint_model
from adapeft.model.quantized import quantized_weights
from adapeft.parts.dense import Dense
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import gather, logits, train
from tests.support.quantized import TYPES, as_dense, load_quantized, make_wide
from tests.support.tiny import make_batches, make_bert
from tests.support.trainers import saving_trainer

LAYER = "bert.encoder.layer.0.intermediate.dense"
WEIGHT, BIAS = f"{LAYER}.weight", f"{LAYER}.bias"
SHAPE = (19, 12)
PARTS = {
    "rows": {WEIGHT: Rows(SHAPE, torch.tensor([1, 5, 18]), 0)},
    "columns": {WEIGHT: Rows(SHAPE, torch.tensor([0, 7]), 1)},
    "few elements": {WEIGHT: Elements(SHAPE, torch.tensor([3, 17, 200]))},
    "many elements": {WEIGHT: Elements(SHAPE, torch.arange(0, 228, 5))},
    "elements of a bias": {BIAS: Elements((19,), torch.tensor([2, 11]))},
    "rows and bias": {WEIGHT: Rows(SHAPE, torch.tensor([4, 18]), 0), BIAS: Elements((19,), torch.tensor([0, 4]))},
    "bias whole": {BIAS: Whole((19,))},
    "lora": {WEIGHT: Lora(SHAPE, 0, 3, 6.0)},
}


@pytest.fixture(params=TYPES)
def quantization(request):
    return request.param


@pytest.fixture
def load(quantization, tmp_path):
    return lambda: load_quantized(make_bert, quantization, tmp_path / "base")


def loss_of(model):
    batch = make_batches(make_bert())[0]
    model.train()  # on a CPU, 8-bit layers compute with the dequantized weight only in training mode
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach())


def filled(model, subset):
    """Attach the subset, and set what it adds to random values."""
    attach(model, subset)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attachment_of(model).trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", PARTS)
def test_loss_and_gradients_are_those_of_the_dequantized_model(kind, load):
    subset = Subset(PARTS[kind])
    model = filled(load(), subset)
    attachment = attachment_of(model)
    dense = as_dense(load(), make_bert).double()
    pieces = {name: attachment.pieces(name) for name in subset.parts}
    with torch.no_grad():
        for name, part in subset.parts.items():
            values = part.joined([piece.detach().double() for piece in pieces[name].values()])
            parameter = dense.get_parameter(name)
            if part.kind == "tensor":
                parameter.copy_(values)
            else:
                indices, difference = part.entries(values)
                flat = parameter.view(-1)
                flat += difference if indices is None else torch.zeros_like(flat).index_add(0, indices, difference)
    found, expected = loss_of(model), loss_of(dense)
    # Sums of at most a few dozen float32 terms per layer, through some ten layers.
    assert found == pytest.approx(expected, rel=1e-5)
    for name, part in subset.parts.items():
        gradient = dense.get_parameter(name).grad
        if part.kind == "lora":
            a, b = (piece.detach().double() for piece in pieces[name].values())
            wanted = [2.0 * b.t() @ gradient, 2.0 * gradient @ a.t()]
        else:
            wanted = [gather(part, gradient)]
        for piece, one in zip(pieces[name].values(), wanted, strict=True):
            torch.testing.assert_close(piece.grad.double(), one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("kind", PARTS)
def test_a_delta_belongs_to_the_quantized_base(kind, load, quantization, tmp_path):
    model = load()
    plain = logits(model)
    train(attach(model, Subset(PARTS[kind])))
    trained = logits(model)
    delta(model).save(tmp_path / "delta.safetensors")
    found = Delta.load(tmp_path / "delta.safetensors")
    assert found.quantization == quantization
    detach(model)
    assert torch.equal(logits(model), plain)
    assert fingerprint_model(model) == found.fingerprint
    fresh = load()
    before = {name: parameter.requires_grad for name, parameter in fresh.named_parameters()}
    applied = found.apply(fresh)
    torch.testing.assert_close(logits(fresh), trained, rtol=1e-4, atol=1e-5)
    assert float((trained - plain).abs().max()) > 1e-4
    applied.revert()
    assert torch.equal(logits(fresh), plain)
    assert {name: parameter.requires_grad for name, parameter in fresh.named_parameters()} == before
    with pytest.raises(AdapeftError, match=f"It was trained on weights quantized to {quantization}"):
        found.apply(make_bert())
    with pytest.raises(AdapeftError, match="the base is quantized, so a plain checkpoint cannot hold"):
        attach(fresh, Subset(PARTS[kind])).save_pretrained(tmp_path / "merged")


def test_deltas_are_swapped_on_a_quantized_base(load):
    found, expected = {}, {}
    for kind in ("rows", "lora"):
        model = load()
        train(attach(model, Subset(PARTS[kind])))
        found[kind], expected[kind] = delta(model), logits(model)
    model = load()
    plain = logits(model)
    with adapeft.Deltas(model, found) as deltas:
        for kind in ("lora", "rows", "lora"):
            deltas.use(kind)
            torch.testing.assert_close(logits(model), expected[kind], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("part", [Whole(SHAPE), Dense(SHAPE)], ids=["tensor", "dense"])
def test_a_quantized_matrix_is_not_trained_whole(part, load, quantization):
    model = load()
    with pytest.raises(AdapeftError, match=rf"1 matrices such as '{WEIGHT}' are quantized \({quantization}\)"):
        attach(model, Subset({WEIGHT: part}))
    assert quantized_weights(model).keys() == {
        name for name, p in model.named_parameters() if not p.is_floating_point()
    }


def test_evaluating_does_not_change_gradients(quantization, tmp_path):
    """On some CPUs bitsandbytes repacks 4-bit weights when evaluating, and then has no backward pass."""
    name = "bert.encoder.layer.0.output.dense.bias"
    subset, gradients = Subset({name: Elements((64,), torch.tensor([2, 11]))}), []
    for is_evaluated in (False, True):
        model = load_quantized(make_wide, quantization, tmp_path / "base", repacks=True)
        for before in (True, False):
            if not before:
                attach(model, subset)
            if is_evaluated:
                with torch.no_grad():
                    logits(model)
        loss_of(model)
        gradients.append(attachment_of(model).trained[name].grad)
    assert gradients[0].any()
    # Repacking rounds the scales of some ten weights to bfloat16, by at most 2^-9 each.
    torch.testing.assert_close(*gradients, rtol=10 * 2**-9, atol=0)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    detach(model)
    fresh = load_quantized(make_wide, quantization, tmp_path / "base", repacks=True)
    can = [getattr(module, "support_avx512bf16_for_cpu", None) for module in fresh.modules()]
    assert [getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()] == can


@pytest.mark.parametrize("kind", [pytest.param("rows and bias", marks=pytest.mark.slow), "lora"])
def test_the_trainer_trains_it_and_resumes_exactly(kind, load, tmp_path):
    through, resumed = (attach(load(), Subset(PARTS[kind])) for _ in range(2))
    saving_trainer(through, tmp_path, 4, gradient_checkpointing=True).train()
    saving_trainer(resumed, tmp_path, 4, gradient_checkpointing=True).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    expected, found = delta(through), delta(resumed)
    for name, change in expected.changes.items():
        assert change.values.any()
        assert torch.equal(found.changes[name].values, change.values)


@pytest.mark.parametrize("kind", ["rows and bias", "few elements", "lora"])
def test_a_delta_is_switched_off_in_place(kind, load):
    model, untouched = load(), logits(load())
    attach(model, Subset(PARTS[kind]))
    train(model)
    after = logits(model)
    assert not torch.equal(after, untouched)
    with adapeft.base(model):
        assert torch.equal(logits(model), untouched)
    assert torch.equal(logits(model), after)

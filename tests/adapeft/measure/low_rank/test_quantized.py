"""Tests of measuring on a quantized base, against the dense model with the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapeft import AdapeftError, attach, delta, select
from adapeft.config.load import parse_select
from adapeft.measure.groups import groups_of
from adapeft.measure.low_rank.windows import Windows
from adapeft.measure.storage import load_groups, save_groups
from adapeft.model.fingerprint import fingerprint_model
from adapeft.model.quantized import quantized_weights
from tests.oracles.leaves import train
from tests.support.quantized import TYPES, as_dense, load_quantized, make_wide
from tests.support.tiny import make_batches, make_bert

WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"
RANK = 8
MEASURED = {"rank": RANK, "warmup_steps": 4}
"""Options of measuring, with few steps of the warm-up, which is not tested here."""


@pytest.fixture(params=TYPES)
def quantization(request):
    return request.param


@pytest.fixture
def model(quantization, tmp_path):
    return load_quantized(make_bert, quantization, tmp_path / "base")


def without_dropout(model):
    """Set training mode, in which 8-bit layers compute with the dequantized weight on a CPU."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_windows_see_projections_of_the_dequantized_models_gradient(model):
    dense = without_dropout(as_dense(model, make_bert).double())
    groups = groups_of(model, parse_select({"groups": "row"}))
    batch = make_batches(make_bert())[0]
    dense(**batch).loss.backward()
    model.requires_grad_(False)
    windows = Windows(model, groups, RANK, seed=3)
    without_dropout(model)(**batch).loss.backward()
    quantized, seen = quantized_weights(model), 0
    parameters = dict(model.named_parameters())
    for place, candidate in enumerate(windows.matrices):
        name = groups.parameters[candidate].name
        if name in quantized:
            seen += 1
            gradient = dense.get_parameter(name).grad
            right = gradient @ windows.right_of(candidate).double()
            left = gradient.t() @ windows.left_of(candidate).double()
            names = (windows.names[candidate], windows.names[len(groups.parameters) + place])
            for leaf, expected in zip(names, (right, left), strict=True):
                found = parameters[leaf].grad.double()
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert seen == len(quantized) == 13
    windows.remove()


@pytest.mark.parametrize(
    "options",
    [{"groups": "row"}, {"groups": "row", "joint": True}, {"groups": "element"}, {"options": ["row", "lora"]}],
    ids=str,
)
def test_a_choice_on_4_bits_is_that_on_the_dequantized_model(options, tmp_path):
    model = load_quantized(make_bert, "nf4", tmp_path / "base")
    dense = as_dense(model, make_bert)
    batches = make_batches(make_bert())
    found = select(model, batches, budget="10%", **MEASURED, **options)
    expected = select(dense, batches, budget="10%", measure="low-rank", **MEASURED, **options)
    assert any(name in quantized_weights(model) for name in found.parts)
    assert found.parts == expected.parts
    assert found.choice.value == pytest.approx(expected.choice.value, rel=1e-3)
    assert found.choice.num_total == expected.choice.num_total
    assert found.choice.fingerprint != expected.choice.fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"groups": "row"},
        {"groups": "element"},
        {"options": ["row", "lora"]},
        {"method": "lora"},
        {"method": "random", "groups": "row"},
        {"method": "random", "groups": "element"},
    ],
    ids=str,
)
def test_what_is_chosen_is_trained(options, model):
    before, batches = fingerprint_model(model), make_batches(make_bert())
    measured = {} if "method" in options else MEASURED
    subset = select(model, batches, budget="12%", **options, **measured)
    assert fingerprint_model(model) == before
    chosen = subset.parts.keys() & quantized_weights(model).keys()
    assert chosen
    train(attach(model, subset))
    assert chosen <= delta(model).changes.keys()


def test_measuring_keeps_weights_from_being_repacked(tmp_path):
    """On some CPUs bitsandbytes repacks 4-bit weights in evaluation mode, which has no backward pass."""
    found = []
    for repacks in (False, True):
        model = load_quantized(make_wide, "nf4", tmp_path / "base", repacks=repacks)
        can = [getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()]
        found.append(select(model, make_batches(make_bert()), budget="1%", **MEASURED))
        assert [getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()] == can
    assert found[0].parts.keys() & quantized_weights(model).keys()
    assert found[0].parts == found[1].parts


def test_stored_groups_say_what_is_quantized(model, tmp_path):
    groups = groups_of(model, parse_select({"groups": "row"}))
    save_groups(tmp_path, groups, {}, {})
    assert load_groups(tmp_path)[0] == groups
    assert groups.is_quantized


def test_biases_and_adapters_are_trained_on_a_quantized_base(model, quantization):
    batches = make_batches(make_bert())
    with pytest.warns(UserWarning, match="\d+ parameters cannot be changed element by element"):
        subset = select(model, batches, budget="10%", method="bitfit")
    assert all(name.endswith("bias") for name in subset.parts)
    subset = select(model, batches, budget="10%", method="adapter")
    train(attach(model, subset))
    assert delta(model).quantization == quantization


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full"},
        {"method": "mixout"},
        {"method": "random", "groups": "tensor"},
        {"groups": "tensor"},
        {"groups": "role"},
        {"options": ["row", "tensor"]},
    ],
    ids=str,
)
def test_training_quantized_matrices_whole_is_refused(options, model, quantization):
    said = rf"trains matrices whole, but 13 candidates such as 'bert.*weight' are quantized \({quantization}\)"
    with pytest.raises(AdapeftError, match=said):
        select(model, make_batches(make_bert()), budget="10%", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measure": "exact"}, "select.measure = exact needs the gradient of every single element"),
        ({"probe_steps": 2, "probe_points": 2}, "select.probe_steps = 2 needs the gradient of every single element"),
        ({"rank": 13}, r"select.rank = 13: the quantized matrix 'bert.* of shape \(12, 12\) is narrower"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(options, said, model):
    with pytest.raises(AdapeftError, match=said):
        select(model, make_batches(make_bert()), budget="10%", **options)

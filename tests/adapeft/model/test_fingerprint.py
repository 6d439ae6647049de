"""Tests that fingerprints are equal for the same base in any representation and differ for another base."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertForSequenceClassification

from adapeft.model.fingerprint import base_name, fingerprint, fingerprint_model, sample
from tests.support.tiny import make_bert, make_gpt2

HEAD = ("classifier.weight", "classifier.bias")


def test_the_dtype_and_the_head_do_not_matter():
    model = make_bert()
    expected = fingerprint_model(model, HEAD)
    nn.init.normal_(model.classifier.weight)
    assert fingerprint_model(model, HEAD) == expected
    assert fingerprint_model(model) != expected
    assert fingerprint_model(model.bfloat16(), HEAD) == expected
    assert fingerprint_model(model.bert) == expected, "the base model alone, whose names lack the prefix"


def test_saving_and_loading_does_not_matter(tmp_path):
    model = make_bert()
    model.bert.save_pretrained(tmp_path)
    for loaded in (
        AutoModel.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
    ):
        assert fingerprint_model(loaded) == fingerprint_model(model, HEAD)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert fingerprint_model(loaded, HEAD) == fingerprint_model(model, HEAD)


@pytest.mark.parametrize("name", [name for name, _ in make_gpt2().named_parameters()][::4])
def test_every_parameter_matters(name):
    model = make_gpt2()
    before = fingerprint_model(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 0.5
    assert fingerprint_model(model) != before


class FourBits(nn.Parameter):
    """Codes 0 … 15 [out, in], two per byte, in one of the two CPU layouts of bitsandbytes."""

    @classmethod
    def of(cls, codes, *, is_blocked):
        if is_blocked:  # in blocks of 32 outputs, for the AVX512-BF16 kernel
            blocks = codes.view(len(codes) // 32, 32, -1, 2).transpose(1, 2).reshape(-1, 64)
            packed = (blocks[:, 32:] << 4 | blocks[:, :32]).view(len(codes), -1)
        else:
            packed = (codes.flatten()[::2] << 4 | codes.flatten()[1::2]).view(-1, 1)
        parameter = cls(packed, requires_grad=False)
        parameter.quant_state = SimpleNamespace(shape=codes.shape)
        return parameter


def test_the_layout_of_four_bit_codes_does_not_matter():
    codes = torch.randint(0, 16, (64, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(24, 64)

    def with_codes(is_blocked):
        layer.weight = FourBits.of(codes, is_blocked=is_blocked)
        return fingerprint_model(layer)

    assert with_codes(False) == with_codes(True)
    before = with_codes(True)
    codes[3, 5] ^= 1
    assert with_codes(False) == with_codes(True) != before


def test_names_and_shapes_matter_and_order_does_not():
    a, b = torch.randn(4), torch.randn(6)
    expected = fingerprint([("a", sample(a), (4,)), ("b", sample(b), (6,))])
    assert fingerprint([("b", sample(b), (6,)), ("a", sample(a), (4,))]) == expected
    assert fingerprint([("a", sample(a), (4,)), ("c", sample(b), (6,))]) != expected
    assert fingerprint([("a", sample(a), (4,)), ("b", sample(b), (2, 3))]) != expected


@pytest.mark.parametrize("count", [0, 1, 7, 65_536, 65_537, 1_000_003])
def test_samples_span_the_whole_tensor(count):
    values = torch.arange(count, dtype=torch.float32)
    picks = sample(values)
    assert len(picks) == min(count, 65_536)
    assert picks.dtype == torch.bfloat16
    if count:
        assert picks[0] == 0
        assert picks[-1] == values[-1].bfloat16()
    if 0 < count <= 65_536:
        assert torch.equal(picks, values.bfloat16()), "a small tensor is taken whole"
    assert torch.equal(sample(values.view(1, -1).t()), picks)


def test_base_names():
    assert base_name("bert.pooler.weight", "bert") == base_name("pooler.weight", "bert") == "pooler.weight"
    assert base_name("bertha.weight", "bert") == "bertha.weight"
    assert base_name("weight", "") == "weight"

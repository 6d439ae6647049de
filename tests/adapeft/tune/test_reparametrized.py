"""Tests of weights computed from other parameters: pruned, normalized, or parametrized before or after ``attach``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, remove_weight_norm, spectral_norm, weight_norm

import adapeft
from adapeft import AdapeftError
from tests.oracles.leaves import logits, make_subset, train
from tests.support.tiny import make_batches, make_bert, make_wav2vec2

WAYS: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized": parametrizations.weight_norm,
}


def dense(model: nn.Module) -> nn.Module:
    return model.bert.encoder.layer[0].attention.self.query


def changed_bert(way: str) -> nn.Module:
    model = make_bert()
    torch.manual_seed(5)  # spectral_norm draws its vectors
    WAYS[way](dense(model))
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_before_attach_it_is_trained_and_applied_but_has_no_plain_checkpoint(way, tmp_path):
    model, base = changed_bert(way), changed_bert(way)
    train(adapeft.attach(model, make_subset(model, "row")))
    adapeft.delta(model).apply(base)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-6)
    assert not torch.equal(logits(changed_bert(way)), logits(model))
    with pytest.raises(AdapeftError, match=r"layer.0.attention.self.query' computes a weight from other parameters"):
        model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_was_made_plain_again_is_saved(tmp_path):
    model = changed_bert("weight_norm")
    remove_weight_norm(dense(model))
    train(adapeft.attach(model, make_subset(model, "row")))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(make_bert()).from_pretrained(tmp_path)), logits(model))


def test_a_class_that_normalizes_weights_itself_is_saved(tmp_path):
    model = make_wav2vec2()
    adapeft.attach(model, make_subset(model, "row"))
    model.save_pretrained(tmp_path)
    values = torch.linspace(-1, 1, 400).view(2, 200)
    loaded = type(make_wav2vec2()).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(values).logits, model.eval()(values).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_after_attach_it_is_refused(way):
    model = make_bert()
    adapeft.attach(model, make_subset(model, "row"))
    layer = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    assert "weight" in layer.leaf_parts

    def normalize_and_run() -> None:
        WAYS[way](layer)
        model.eval()(**make_batches(model)[0])

    with pytest.raises(AdapeftError, match=r"normalize .* before adapeft\.attach, or after"):
        normalize_and_run()

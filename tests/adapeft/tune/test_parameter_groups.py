"""Parameter groups for the optimizer: what is decayed, and the rate of the head."""

from __future__ import annotations

import pytest
import torch

import adapeft
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from tests.support.tiny import make_bert


@pytest.mark.parametrize("head_rate", [None, 2e-2])
def test_matrices_are_decayed_and_the_head_has_its_rate(head_rate):
    model = make_bert()
    weight = "bert.encoder.layer.0.output.dense.weight"
    shape = tuple(model.get_parameter(weight).shape)
    head, pretrained = ("classifier.weight", "classifier.bias"), "bert.embeddings.LayerNorm.weight"
    adapeft.attach(model, Subset({weight: Rows(shape, torch.tensor([0, 2]))}, (*head, pretrained), head))
    groups = adapeft.parameter_groups(model, 1e-3, 0.1, head_rate)
    found = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    rate = 1e-3 if head_rate is None else head_rate
    (leaf,) = (p for n, p in model.named_parameters() if p.requires_grad and n not in (*head, pretrained))
    assert found == {
        id(leaf): (1e-3, 0.1),
        id(model.get_parameter(pretrained)): (1e-3, 0.0),
        id(model.classifier.weight): (rate, 0.1),
        id(model.classifier.bias): (rate, 0.0),
    }

"""A delta of a model whose frozen parameters were changed is refused: it would leave the change out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from adapeft import AdapeftError, attach, delta
from adapeft.choose.subset import Part, Subset
from tests.oracles_tune import SUBSETS, make_subset, train
from tests.tiny import make_batches, make_bert, make_gpt2

POOLER = "bert.pooler.dense.weight"
LORA = Subset({POOLER: Part("lora", (12, 12), None, 0, 2, 2.0)})


def unfreeze(model: nn.Module) -> None:
    """Somebody trains one more layer than the subset has."""
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)


def moving_codebook(model: nn.Module) -> None:
    """A layer that follows its inputs with a parameter, as codebooks do."""

    def follow(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        with torch.no_grad():
            module.weight.mul_(0.99).add_(0.01 * inputs[0].mean())

    model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(follow)


@pytest.mark.parametrize("change", [unfreeze, moving_codebook])
def test_a_change_of_what_is_frozen_is_refused_by_name(change: Callable[[nn.Module], None]):
    model = attach(make_bert(), LORA)
    change(model)
    train(model)
    with pytest.raises(AdapeftError, match=r"'encoder.layer.0.output.dense.weight' \(and 0 more\) was frozen"):
        delta(model)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("kind", SUBSETS)
def test_what_is_trained_may_change(make, kind):
    model = make()
    train(attach(model, make_subset(model, kind)))
    assert delta(model).changes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_no_change(dtype):
    model = attach(make_bert(), LORA)
    train(model)
    assert delta(model.to(dtype)).changes
    assert model(**make_batches(model)[0]).logits.dtype == dtype

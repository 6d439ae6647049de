"""Tests that a delta is refused if frozen parameters were changed, because it would leave the change out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapeft import AdapeftError, attach, delta
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.oracles.leaves import SUBSETS, make_subset, train
from tests.support.tiny import VOCABULARY, make_batches, make_bert, make_gpt2

POOLER = "bert.pooler.dense.weight"
LORA = Subset({POOLER: Lora((12, 12), 0, 2, 2.0)})
WHOLE = Subset({"bert.embeddings.word_embeddings.weight": Whole((VOCABULARY, 12))})


def moving_codebook(model: nn.Module) -> None:
    """Add a layer that updates a parameter from its inputs, as codebooks do."""

    def follow(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        with torch.no_grad():
            module.weight.mul_(0.99).add_(0.01 * inputs[0].mean())

    model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(follow)


def test_a_change_of_what_is_frozen_is_refused_by_name():
    model = attach(make_bert(), LORA)
    moving_codebook(model)
    train(model)
    with pytest.raises(AdapeftError, match=r"'encoder.layer.0.output.dense.weight' \(and 0 more\) was frozen"):
        delta(model)


def unfreeze(model: nn.Module) -> None:
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)


def unfreeze_all(model: nn.Module) -> None:
    model.requires_grad_(True)


def add_a_head(model: nn.Module) -> None:
    model.bert.second_head = nn.Linear(12, 2)


def resize_to_the_same(model: nn.Module) -> None:
    """Resize to the same size, after which transformers makes an embedding with trained rows require gradients."""
    model.resize_token_embeddings(VOCABULARY)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (unfreeze, "bert.encoder.layer.0.output.dense.weight"),
        (unfreeze_all, "bert.embeddings.word_embeddings.weight"),
        (add_a_head, "bert.second_head.weight"),
        (resize_to_the_same, "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_what_would_train_besides_the_subset_is_refused_before_it_does(change, name):
    model = attach(make_bert(), make_subset(make_bert(), "row"))
    change(model)
    with pytest.raises(AdapeftError, match=rf"outside the subset require gradients, such as '{name}'"):
        model.train()(**make_batches(model)[0])
    assert model.eval()(**make_batches(model)[0]).loss.isfinite(), "evaluating trains nothing"


def load_another(model: nn.Module) -> None:
    other = {name: value * 1.5 for name, value in make_bert().state_dict().items() if "pooler" not in name}
    model.load_state_dict(other, strict=False)


def resize(model: nn.Module) -> None:
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)


@pytest.mark.parametrize(
    ("change", "subset", "message"),
    [
        (load_another, LORA, "embeddings.word_embeddings.weight' .* values or shape have changed: it was loaded"),
        (resize, LORA, "embeddings.word_embeddings.weight' .* values or shape have changed: it was loaded"),
        (resize, WHOLE, r"had shape \(29, 12\) when the subset was attached and has \(31, 12\) now"),
    ],
)
def test_another_base_is_refused_by_the_first_step(change, subset, message):
    model = attach(make_bert(), subset)
    change(model)
    with pytest.raises(AdapeftError, match=message):
        model.train()(**make_batches(model)[0])


def test_a_replaced_layer_is_refused_by_the_first_step():
    model = attach(make_bert(), Subset({POOLER: Rows((12, 12), torch.tensor([3]))}))
    model.bert.pooler.dense = nn.Linear(12, 12).requires_grad_(False)
    with pytest.raises(AdapeftError, match=f"the module that trains '{POOLER}' is no longer in the model"):
        model.train()(**make_batches(model)[0])


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

"""Tests that models of many families are measured, attached and shipped without a table of their names."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import adapeft
from adapeft.model.structure import describe_parameters

SMALL = {"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=20, num_key_value_heads=1)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, intermediate_size=20, num_key_value_heads=1, num_local_experts=2)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=20, word_embed_proj_dim=12, max_position_embeddings=16)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=29, hidden_size=12, n_layer=2, n_head=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, intermediate_size=20, num_labels=3)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=29, dim=12, n_layers=2, n_heads=3, hidden_dim=20, num_labels=3)
    ),
    "qwen2": lambda: Qwen2ForSequenceClassification(
        Qwen2Config(**SMALL, intermediate_size=20, num_key_value_heads=1, num_labels=3, pad_token_id=0)
    ),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name]()
    is_classifier = type(model).__name__.endswith("Classification")
    model.config.architectures = None if is_classifier else [type(model).__name__]
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(4):
        ids = torch.randint(3, 29, (4, 7), generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator) if is_classifier else ids
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return model, batches


@pytest.mark.parametrize("groups", ["tensor", "row", "element"])
@pytest.mark.parametrize("name", MODELS)
def test_a_subset_is_chosen_trained_and_shipped(name, groups, tmp_path):
    model, batches = make(name)
    chosen = {"fill": False} if groups == "element" else {}  # random weights have slopes that are noise
    subset = adapeft.select(model, batches, budget="10%", groups=groups, warmup_steps=4, **chosen)
    adapeft.attach(model, subset)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapeft.delta(model).save(tmp_path / "delta.safetensors")
    trained = model.eval()(**batches[0]).logits

    fresh, _ = make(name)
    adapeft.Delta.load(tmp_path / "delta.safetensors").apply(fresh)
    torch.testing.assert_close(fresh.eval()(**batches[0]).logits, trained, rtol=1e-4, atol=1e-5)
    assert subset.count > 0


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found(name):
    model, _ = make(name)
    parameters = describe_parameters(model)
    assert {info.layer for info in parameters} == {-1, 0, 1}
    roles = [{info.role for info in parameters if info.layer == layer} for layer in (0, 1)]
    assert roles[0] == roles[1]
    assert {info.depth for info in parameters if info.layer >= 0} == {0.0, 1.0}

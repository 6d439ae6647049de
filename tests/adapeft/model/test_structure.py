"""Tests of roles, layers, depth and heads, derived from the module tree."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BambaConfig,
    DeepseekV3Config,
    JambaConfig,
    T5Config,
)

from adapeft.errors import AdapeftError
from adapeft.model.structure import always_trained, describe_parameters, match_patterns, new_parameters


def described(model):
    return {info.name: info for info in describe_parameters(model)}


def test_blocks_have_layer_role_and_depth(bert):
    infos = described(bert)
    assert list(infos) == [name for name, _ in bert.named_parameters()]
    for layer in (0, 1):
        info = infos[f"bert.encoder.layer.{layer}.attention.self.query.weight"]
        assert (info.role, info.layer, info.depth) == ("attention.self.query.weight", layer, float(layer))
        assert (info.shape, info.count) == ((12, 12), 144)


def test_what_is_outside_of_blocks_is_before_or_after(bert):
    infos = described(bert)
    before, after = infos["bert.embeddings.LayerNorm.weight"], infos["bert.pooler.dense.weight"]
    assert (before.layer, before.depth, before.role) == (-1, 0.0, "bert.embeddings.LayerNorm.weight")
    assert (after.layer, after.depth) == (-1, 1.0)


def test_only_the_outermost_block_list_counts():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(3))
    info = described(model)["blocks.1.experts.2.weight"]
    assert (info.layer, info.role, info.depth) == (1, "experts.2.weight", 0.5)


def test_tied_weights_are_one_parameter(gpt2):
    infos = described(gpt2)
    assert "transformer.wte.weight" in infos
    assert "lm_head.weight" not in infos
    assert sum(info.count for info in infos.values()) == sum(p.numel() for p in gpt2.parameters())


def test_output_dim(bert, gpt2):
    linear, conv1d = described(bert), described(gpt2)
    assert linear["bert.encoder.layer.0.intermediate.dense.weight"].output_dim == 0
    assert linear["bert.embeddings.word_embeddings.weight"].output_dim == 0
    assert linear["bert.encoder.layer.0.intermediate.dense.bias"].output_dim is None
    assert conv1d["transformer.h.0.mlp.c_fc.weight"].output_dim == 1
    assert conv1d["transformer.wte.weight"].output_dim == 0


def test_a_head_is_new_unless_its_own_class_wrote_the_checkpoint(bert, gpt2):
    head = ("classifier.weight", "classifier.bias")
    for written_by in (["BertModel"], ["BertForMaskedLM"], None):
        bert.config.architectures = written_by
        assert new_parameters(bert) == head
    bert.config.architectures = ["BertForSequenceClassification"]
    assert new_parameters(bert) == ()
    assert new_parameters(gpt2) == ()
    gpt2.config.architectures = ["GPT2Model"]
    assert new_parameters(gpt2) == (), "its head is the embedding, which the base model has"


def test_auto_is_the_new_head_and_patterns_add_to_it(bert):
    head = {"classifier.weight", "classifier.bias"}
    assert always_trained(bert, ["auto"]) == head
    assert always_trained(bert, []) == set()
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert always_trained(bert, ["auto", "*pooler*"]) == head | pooler


def test_patterns_match_whole_names():
    names = ["a.0.query.weight", "a.0.query.bias", "a.1.key.weight"]
    assert match_patterns("select.include", ["*query*"], dict(zip(names, names, strict=True))) == set(names[:2])
    assert match_patterns("select.include", ["*.1.*", "*.bias"], dict(zip(names, names, strict=True))) == set(names[1:])


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [
        ("*qurey*", "Did you mean 'query'"),
        ("query", r"put '\*' around a part"),
        ("a.0.query.wieght", "a.0.query.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern, suggestion):
    names = ["a.0.query.weight", "a.0.query.bias", "a.1.key.weight"]
    with pytest.raises(AdapeftError, match=f"select.exclude: the pattern .* matches no parameter.*{suggestion}"):
        match_patterns("select.exclude", ["*key*", pattern], dict(zip(names, names, strict=True)))


def test_the_meta_device_has_the_same_structure(bert):
    with torch.device("meta"):
        empty = type(bert)(bert.config)
    assert describe_parameters(empty) == describe_parameters(bert)
    assert new_parameters(empty) == new_parameters(bert)


SIZES = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}


def built(config, auto=AutoModelForCausalLM):
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize(
    ("config", "role", "layers"),
    [
        (
            JambaConfig(**SIZES, num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
            "self_attn.q_proj.weight", [1, 3],
        ),
        (
            JambaConfig(**SIZES, num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
            "mamba.in_proj.weight", [0, 2],
        ),
        (BambaConfig(**SIZES, num_key_value_heads=1, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8),
         "mamba.in_proj.weight", [0, 2, 3]),
        (DeepseekV3Config(**SIZES, first_k_dense_replace=1, n_routed_experts=8), "mlp.down_proj.weight", [0]),
        (DeepseekV3Config(**SIZES, first_k_dense_replace=1, n_routed_experts=8), "mlp.gate.weight", [1, 2, 3]),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_blocks_of_several_kinds_are_one_list(config, role, layers):
    infos = describe_parameters(built(config))
    assert {info.layer for info in infos} == {-1, 0, 1, 2, 3}
    assert [info.layer for info in infos if info.role == role] == layers
    assert {info.depth for info in infos if info.layer == 3} == {1.0}
    assert all(info.layer >= 0 for info in infos if ".layers." in info.name)


def test_encoder_and_decoder_have_a_list_each():
    """The first block of T5 has the relative positions of all blocks."""
    config = T5Config(vocab_size=29, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
    infos = describe_parameters(built(config, AutoModelForSeq2SeqLM))
    for side in ("encoder", "decoder"):
        layers = [i.layer for i in infos if i.name.startswith(side) and i.role.endswith("SelfAttention.q.weight")]
        assert layers == [0, 1, 2]
        (positions,) = [i for i in infos if i.name.startswith(side) and "relative_attention_bias" in i.name]
        assert positions.layer == 0


def test_what_is_no_list_of_blocks():
    """A network of single layers, named parts, and a parametrization, which is also a ModuleList."""
    model = nn.Module()
    model.network = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2)])
    model.named = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.Linear(2, 2)))
    model.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert {info.layer for info in describe_parameters(model)} == {-1}

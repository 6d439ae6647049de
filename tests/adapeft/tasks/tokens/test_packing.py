"""Packed batches: losses, gradients, sampled labels and sums are those of the separate examples, in float64."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from adapeft.errors import AdapeftError
from adapeft.ranks import OneRank
from adapeft.tasks.losses import pieces
from adapeft.tasks.losses.cross_entropy import NextToken
from adapeft.tasks.losses.micro_batches import example_losses, micro_losses
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.losses.own_loss import check_own_loss, check_packing
from adapeft.tasks.tokens.packing import packed_batch, rows_of
from adapeft.tasks.tokens.tokenize import TokenizedData
from tests.oracles.measuring import in_double
from tests.support.chats import make_tokenizer
from tests.support.questions import make_gpt2, make_llama

LENGTHS = [3, 7, 2, 5, 4]
CAPACITY = 10
CPU = torch.device("cpu")


def make_mistral() -> PreTrainedModel:
    return _made(MistralForCausalLM, MistralConfig, sliding_window=3)


def make_qwen() -> PreTrainedModel:
    return _made(Qwen2ForCausalLM, Qwen2Config)


def _made(kind, config, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokenizer = make_tokenizer()
    ids = {"pad_token_id": 4, "vocab_size": len(tokenizer), "initializer_range": 0.3}
    return kind(config(**sizes, **heads, **ids, **options)).eval()


@pytest.fixture
def padded() -> TokenizedData:
    """Return examples of which some tokens have no label, and one has none but that of its first token."""
    draw = np.random.default_rng(0)
    rows = []
    for length in LENGTHS:
        ids = draw.integers(5, 200, length).tolist()
        labels = [token if draw.random() < 0.7 else IGNORED for token in ids]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    rows[2]["labels"] = [rows[2]["input_ids"][0], IGNORED]
    return TokenizedData(datasets.Dataset.from_list(rows), None, make_tokenizer())


@pytest.fixture
def packed(padded) -> TokenizedData:
    return TokenizedData(padded.rows, None, padded.tokenizer, packed_length=CAPACITY)


def summed(model, data, sample_seed=None):
    """Return loss and gradients of all examples as measuring and training compute them."""
    model.zero_grad()
    losses, count = micro_losses(
        np.arange(len(LENGTHS)), data.collate, NextToken(), OneRank(), 2, CPU, sample_seed=sample_seed
    )
    total = sum(loss(model) for loss in losses)
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return float(total.detach()), gradients, count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_mistral, make_qwen])
@pytest.mark.parametrize("sample_seed", [None, 5])
@pytest.mark.parametrize("piece_bytes", [2**26, 4096])
def test_a_packed_batch_is_its_examples(make, attention, sample_seed, piece_bytes, padded, packed, monkeypatch):
    """The oracle is the model on each example alone. In pieces, logits are computed from the split model's states."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    model = in_double(make())
    model.set_attn_implementation(attention)
    model.zero_grad()
    objective, expected, predictions = NextToken(), 0.0, 0
    for example in range(len(LENGTHS)):
        batch = padded.collate([example])
        logits = model(input_ids=batch.inputs["input_ids"]).logits
        labels = batch.labels if sample_seed is None else objective.sample_labels(logits, batch, sample_seed)
        expected = expected + objective.loss_sum(logits, labels)
        predictions += objective.num_predictions(labels)
    (expected / predictions).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loss, found, count = summed(model, packed, sample_seed)
    assert count == predictions
    assert loss == pytest.approx(float(expected / predictions), rel=1e-12)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12 * largest)


def test_losses_belong_to_their_examples(padded, packed):
    model, objective = in_double(make_llama()), NextToken()
    alone = [float(objective.example_losses(model, padded.collate([example]))) for example in range(len(LENGTHS))]
    batch = packed.collate(range(len(LENGTHS)))
    assert batch.labels.shape == (3, 9)
    assert objective.example_losses(model, batch).tolist() == pytest.approx(alone, rel=1e-12)
    found = example_losses(np.arange(5), packed.collate, objective, CPU, lambda loss: float(loss(model)))
    assert list(found.values()) == pytest.approx(alone, rel=1e-12)


def test_the_own_loss_of_the_model_is_compared(packed, monkeypatch):
    for piece_bytes in (2**26, 4096):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        check_own_loss(NextToken(), packed.collate(range(5)), make_llama())


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([3, 7, 2, 5, 4], [[0, 2, 4], [1], [3]]),
        ([10, 10], [[0], [1]]),
        ([1] * 12, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        ([6, 6, 6, 4], [[0], [1], [2], [3]]),  # 3 rows of 10 would be more than 4 of 6
    ],
)
def test_rows(lengths, rows):
    assert rows_of(lengths, 10) == rows


def test_a_batch_has_no_padding_if_one_row_holds_it(packed):
    batch = packed.collate([0, 2, 4])
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.example_of.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]
    assert batch.ids.tolist() == [0, 2, 4]
    assert [batch.labels[0, place].item() for place in (0, 3, 5)] == [IGNORED] * 3


class Careless(GPT2LMHeadModel):
    """A model that restarts positions, but whose tokens attend to all before them."""

    def forward(self, input_ids=None, attention_mask=None, **options):
        return super().forward(input_ids, attention_mask=torch.ones_like(input_ids), **options)


class Counting(GPT2LMHeadModel):
    """A model that takes no positions."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, labels=None):
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache, labels=labels)


def make_mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "vocab_size": len(make_tokenizer())}
    return MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.5)).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Careless(make_gpt2().config).eval(), r"Careless computes different logits .* as if it had read them"),
        (lambda: Counting(make_gpt2().config).eval(), r"Counting cannot be told where .* 'position_ids'"),
        (make_mamba, r"MambaForCausalLM "),
        (make_llama, None),
        (make_mistral, None),
    ],
)
def test_a_model_that_leaks_is_refused(make, message, padded):
    examples = [3, 0, 1]
    columns = padded.rows[examples]
    packed = packed_batch(columns["input_ids"], columns["labels"], torch.tensor(examples), [[0, 1], [2]], 4)
    alone = [padded.collate([example]) for example in examples]
    if message is None:
        check_packing(NextToken(), alone, packed, make())
        return
    with pytest.raises(AdapeftError, match=rf"^data\.packing = true: {message}.* Set data\.packing: false"):
        check_packing(NextToken(), alone, packed, make())

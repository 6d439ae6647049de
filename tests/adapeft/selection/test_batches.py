"""Tests of user-supplied batches: any modality, packed rows, and values that are not tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
)

import adapeft
from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.measure.groups import build_groups
from adapeft.selection.batches import as_batches, examples_of
from tests.oracles.measuring import gradients
from tests.support.tiny import (
    VOCABULARY,
    make_bart,
    make_batches,
    make_bert,
    make_gpt2,
    make_t5,
    make_vit,
    make_whisper,
)

GENERATOR = torch.Generator()


def drawn(*shape: int, low: int = 3, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR)


def to_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 10}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))


def packed(**options) -> list[dict]:
    collator = DataCollatorWithFlattening(**options)
    examples = [[{"input_ids": drawn(length).tolist()} for length in (5, 3, 6)] for _ in range(4)]
    return [collator(each, return_tensors="pt") for each in examples]


def transcribed() -> dict:
    labels = drawn(4, 6)
    labels[1, 3:] = -100
    return {"labels": labels}


def make_answerer() -> BertForQuestionAnswering:
    return of_bert(BertForQuestionAnswering)


def make_tagger() -> BertForTokenClassification:
    return of_bert(BertForTokenClassification, num_labels=3)


def of_bert(kind: type, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 10}
    return kind(BertConfig(vocab_size=VOCABULARY, **sizes, **options))


def tagged() -> dict:
    """Return texts with classes of their tokens, some of which have none."""
    labels = drawn(4, 6, low=0, high=3)
    labels[:, ::2] = -100
    return {**tokens(), "labels": labels}


def answered() -> dict:
    """Return questions of any length with the positions of their answers."""
    length = int(drawn(1, low=5, high=9))
    start = drawn(4, low=0, high=length)
    return {
        **tokens(length),
        "start_positions": start,
        "end_positions": torch.maximum(start, drawn(4, low=0, high=length)),
    }


def tokens(length: int = 6) -> dict:
    return {"input_ids": drawn(4, length)}


def floats(name: str, *shape: int) -> dict:
    return {name: torch.randn(4, *shape, generator=GENERATOR)}


KINDS = {
    "images": (make_vit, lambda: {**floats("pixel_values", 3, 8, 8), "labels": drawn(4, low=0, high=3)}),
    "speech-to-text": (make_whisper, lambda: {**floats("input_features", 4, 12), **transcribed()}),
    "t5": (make_t5, lambda: {**tokens(), **transcribed()}),
    "bart": (make_bart, lambda: {**tokens(), "attention_mask": torch.ones(4, 6, dtype=torch.long), **transcribed()}),
    "bart-other-length": (make_bart, lambda: {**tokens(9), **transcribed()}),
    "packed": (make_llama, lambda: packed()[0]),
    "divided-by-the-trainer": (make_gpt2, lambda: {**tokens(), "num_items_in_batch": 7, **transcribed()}),
    "questions": (make_answerer, answered),
    "tags": (make_tagger, tagged),
    "shared-values": (make_gpt2, lambda: {**tokens(), "use_cache": False, "past_key_values": None, **transcribed()}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_models_own_loss(kind):
    GENERATOR.manual_seed(0)
    make, draw = KINDS[kind]
    model, batches = make(), [draw() for _ in range(4)]
    groups = build_groups(model, "element")
    total, weight = 0, 0
    for batch in batches:
        own = {name: value for name, value in batch.items() if name != "num_items_in_batch"}
        labels = batch["labels"] if "labels" in batch else batch["start_positions"]
        labels = labels[:, 1:] if make in (make_gpt2, make_llama) else labels
        count = int((labels != -100).sum())
        total += count * torch.cat(gradients(model, {n: to_double(value) for n, value in own.items()}, groups))
        weight += count
    subset = adapeft.select(model, batches, method="sam", budget=60, warmup_steps=0)
    flat = (total / weight).square()
    found, start = [], 0
    for info in groups.parameters:
        if info.name in subset.parts:
            found.append(subset.parts[info.name].indices + start)
        start += info.count
    assert flat[torch.cat(found)].sum() == pytest.approx(float(flat.topk(60).values.sum()), rel=1e-4)
    assert subset.choice.value == pytest.approx(float(flat.topk(60).values.sum()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["adapeft", "fish"])
def test_every_method_takes_every_modality(kind, method):
    GENERATOR.manual_seed(0)
    make, draw = KINDS[kind]
    batches = [draw() for _ in range(4)]
    if kind == "packed" and method == "fish":
        pytest.skip("refused, see below")
    settings = {"method": method, "budget": "5%", "groups": "element", "warmup_steps": 2}
    chosen = {"fill": False} if method == "adapeft" else {}  # random weights have slopes that are noise
    assert adapeft.select(make(), batches, **settings, **chosen).count > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "position_ids"),
        ({"return_position_ids": False, "return_seq_idx": True}, "seq_idx"),
        ({"return_flash_attn_kwargs": True, "return_position_ids": False}, "cu_seq_lens_q"),
    ],
)
def test_packed_rows_are_no_examples(options, name):
    GENERATOR.manual_seed(0)
    batches = packed(**options)
    given = as_batches(batches, make_llama())
    assert [len(batch.ids) for batch in given] == [1] * 4
    with pytest.raises(
        AdapeftError, match=f"method = fish measures example by example, but batch 0 is packed: according to '{name}'"
    ):
        examples_of(given, "fish")
    with pytest.raises(AdapeftError, match=f"batch 0 is packed: according to '{name}'"):
        adapeft.select(make_llama(), batches, method="fish", budget=100)
    for batch in given:
        moved = batch.to("cpu")
        assert moved.inputs.get("max_length_q") == batches[0].get("max_length_q")


def test_padding_is_no_packing():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for padding in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, padding)
        inputs = {"input_ids": mask, "attention_mask": mask, "position_ids": positions, "labels": mask}
        batches = as_batches([inputs] * 2, make_llama())
        assert len(examples_of(batches, "fish")) == 6
        # Two examples in the second row.
        again = positions.clone()
        again[1, 3:] = torch.tensor([0, 1])
        with pytest.raises(AdapeftError, match="batch 1 is packed"):
            examples_of(as_batches([inputs, {**inputs, "position_ids": again}], make_llama()), "fish")


def test_inputs_that_are_not_divided_by_example():
    """Image patches of a vision-language model, or positions that all examples share."""
    batch = Batch({"input_ids": torch.ones(3, 4), "pixel_values": torch.ones(14, 5)}, torch.ones(3, 4), torch.arange(3))
    with pytest.raises(AdapeftError, match=r"'pixel_values' of shape \[14, 5\] cannot be divided into the 3 examples"):
        batch.example(0)
    single = Batch({"pixel_values": torch.ones(14, 5), "max_length_q": 7}, torch.ones(1, 4), torch.arange(1))
    assert single.example(0) is single
    shared = Batch({"input_ids": torch.ones(3, 4), "max_length_q": 7}, torch.ones(3, 4), torch.arange(3)).example(1)
    assert shared.inputs["max_length_q"] == 7
    assert shared.inputs["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ["a", "b"]}, "batch 1 contains 'text', which is a list; inputs must be tensors or numbers"),
        (
            {"token_type_ids": [[0, 1]]},
            "batch 1 contains 'token_type_ids', which is a list; inputs must be tensors",
        ),
        ({"token_type_ids": "zeros"}, "batch 1 contains 'token_type_ids', which is a str"),
        ({"token_type_ids": torch.zeros(5, 9).numpy()}, "batch 1 contains 'token_type_ids', which is a ndarray"),
        ({"labels": [0, 1, 2, 0, 1]}, "labels of batch 1 are a list. Pass a tensor"),
        ({"labels": torch.tensor(1)}, r"labels of batch 1 are of shape \[\]. Pass a tensor with one row per example"),
        ({"labels": None}, "a batch has no 'labels'"),
    ],
)
def test_values_that_no_model_takes(bert, change, message):
    batches = make_batches(bert)
    batches[1] |= change
    with pytest.raises(AdapeftError, match=message):
        adapeft.select(bert, batches, budget=100)


def test_columns_that_the_model_does_not_know():
    class Closed(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask, labels=labels)

    model = Closed(make_bert().config)
    batches = [{**batch, "idx": torch.arange(len(batch["labels"]))} for batch in make_batches(model)]
    message = r"batch 0 contains 'idx', .* forward does not accept \(it accepts attention_mask, input_ids, labels\)"
    with pytest.raises(AdapeftError, match=message):
        adapeft.select(model, batches, budget=100)


def test_a_batch_that_is_no_mapping(bert):
    with pytest.raises(AdapeftError, match=r"batch 0 is a tuple\. Pass mappings of the model's inputs and 'labels'"):
        adapeft.select(bert, [(torch.ones(2, 3), torch.ones(2))] * 2, budget=100)


@pytest.mark.parametrize("position", [-100, 40])
def test_answers_outside_their_text(position):
    """transformers would take the first for position 0, and leave out the second."""
    GENERATOR.manual_seed(0)
    batches = [answered() for _ in range(4)]
    batches[2]["end_positions"][1] = position
    length = batches[2]["input_ids"].shape[1]
    message = rf"labels of batch 2 .* {position} is outside the {length} tokens of its text, .*\. Set both positions of"
    with pytest.raises(AdapeftError, match=message):
        adapeft.select(make_answerer(), batches, budget="5%")
    batches[1]["end_positions"] = batches[1]["end_positions"][:3]
    with pytest.raises(AdapeftError, match="batch 1 has 4 start_positions and 3 end_positions"):
        adapeft.select(make_answerer(), batches, budget="5%")

"""Tests of the tokens of conversations: which are trained, which rows are dropped, and what a model sees."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel

from adapeft.config.load import parse_config
from adapeft.data.cache import Cache
from adapeft.errors import AdapeftError
from adapeft.tasks.describe import describe
from adapeft.tasks.losses.cross_entropy import NextToken
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.registry import TASKS
from tests.support import chats
from tests.support.checkpoints import write_lines

TASK = TASKS["instruct"]
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " hello "},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
CHAT = {"messages": TURNS}


def tokenized(rows, tokenizer, cache=None, **options):
    data = TASK.data(train="a.jsonl", evaluation="a.jsonl", **options)
    return TASK.tokenize(datasets.Dataset.from_list(rows), data, tokenizer, cache=cache)


def trained(example, tokenizer):
    """Return the trained stretches of an example as texts."""
    stretches, last = [], None
    for place, (token, label) in enumerate(zip(example["input_ids"], example["labels"], strict=True)):
        assert label in (token, IGNORED)
        if label != IGNORED:
            stretches += [[]] if last != place - 1 else []
            stretches[-1].append(token)
            last = place
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (chats.CHATML, [" hello <|im_end|>", "so long<|im_end|>"]),
        (chats.MARKED, [" hello <|im_end|>", "so long<|im_end|>"]),
        (chats.TRIMMED, [" hello</s>", " so long</s>"]),
    ],
)
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_only_the_named_tokens_are_trained(template, answers, train_on):
    tokenizer = chats.make_tokenizer(template)
    [example] = tokenized([CHAT], tokenizer, train_on=train_on).rows
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == text
    assert trained(example, tokenizer) == {"completion": answers[1:], "assistant": answers, "all": [text]}[train_on]


def test_marks_and_prefixes_give_the_same():
    one, other = (tokenized([CHAT], chats.make_tokenizer(kind)).rows[0] for kind in (chats.CHATML, chats.MARKED))
    assert one == other


def test_the_config_s_template_replaces_the_tokenizer_s(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(chats.TRIMMED)
    tokenizer = chats.make_tokenizer(None)
    [example] = tokenized([CHAT], tokenizer, chat_template=str(path)).rows
    assert tokenizer.decode(example["input_ids"]).startswith("<s>[INST] hi [/INST]")
    for options in ({}, {"train_on": "all"}, {"train_on": "all", "invalid": "drop"}):
        with pytest.raises(AdapeftError, match=r"^model\.name: .*no chat template.*Set data\.chat_template"):
            tokenized([CHAT], tokenizer, **options)


@pytest.mark.parametrize("template", [chats.WITHOUT_EARLIER_THOUGHTS, chats.LAST_FIRST])
def test_a_template_that_rewrites_earlier_messages_is_refused(template):
    turns = [TURNS[0], {"role": "assistant", "content": "<think>hm</think>hello"}, *TURNS[2:]]
    tokenizer = chats.make_tokenizer(template)
    with pytest.raises(AdapeftError, match=r"row 0 \(counted from 0\): the chat template writes message 1"):
        tokenized([{"messages": turns}], tokenizer)
    assert len(tokenized([{"messages": turns}], tokenizer, train_on="all")) == 1


def test_a_template_s_own_error_names_the_row():
    rows = [CHAT, {"messages": [{"role": "system", "content": "s"}, *TURNS]}]
    with pytest.raises(AdapeftError, match=r"row 1 .*rejects it: Only user and assistant roles"):
        tokenized(rows, chats.make_tokenizer(chats.TRIMMED))


CALLS = [
    TURNS[0],
    {"role": "assistant", "tool_calls": [{"function": {"name": "at", "arguments": '{"hour": 9}'}}]},
    {"role": "tool", "content": "nine"},
    {"role": "assistant", "content": "late"},
]
SCHEMA = {"type": "function", "function": {"name": "at", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("template", [chats.TOOLS, chats.MARKED_TOOLS])
def test_calls_are_trained_and_schemas_and_results_are_read(template):
    tokenizer = chats.make_tokenizer(template)
    [example] = tokenized([{"messages": CALLS, "tools": [SCHEMA]}], tokenizer).rows
    called = '<call>at {"hour": 9}</call><|im_end|>'
    assert trained(example, tokenizer) == [called, "late<|im_end|>"]
    text = tokenizer.decode(example["input_ids"])
    assert text.startswith(f"<|im_start|>system\n{json.dumps([SCHEMA])}<|im_end|>\n")
    assert "<|im_start|>tool\nnine<|im_end|>" in text


def test_calls_that_the_template_does_not_write_are_refused():
    message = {**CALLS[1], "content": "so"}
    for options in ({}, {"train_on": "all"}):
        with pytest.raises(AdapeftError, match=r"row 0 .*the chat template does not write the 'tool_calls'"):
            tokenized([{"messages": [TURNS[0], message]}], chats.make_tokenizer(), **options)


@pytest.mark.parametrize("template", [chats.CHATML, chats.MARKED])
@pytest.mark.parametrize("weight", [0, 0.0])
def test_answers_of_weight_0_are_read_and_not_trained(template, weight):
    tokenizer = chats.make_tokenizer(template)
    turns = [TURNS[0], {**TURNS[1], "weight": weight}, TURNS[2], {**TURNS[3], "weight": 1}]
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    start = text.index(" hello ")
    around = [text[:start], text[start + len(" hello <|im_end|>") :]]
    last = ["so long<|im_end|>"]
    for train_on, expected in (("assistant", last), ("completion", last), ("all", around)):
        [example] = tokenized([{"messages": turns}], tokenizer, train_on=train_on).rows
        assert tokenizer.decode(example["input_ids"]) == text
        assert trained(example, tokenizer) == expected
    reversed_ = [TURNS[0], {**TURNS[1], "weight": 1}, TURNS[2], {**TURNS[3], "weight": weight}]
    [example] = tokenized([{"messages": reversed_}], tokenizer).rows
    assert trained(example, tokenizer) == [" hello <|im_end|>"]
    rows = [{"messages": reversed_}, {"messages": turns}]
    with pytest.raises(AdapeftError, match=r"row 0 .*: no token of it is trained\. Correct .*set data\.invalid: drop"):
        tokenized(rows, tokenizer, train_on="completion")
    assert len(tokenized(rows, tokenizer, train_on="completion", invalid="drop")) == 1


def test_only_answers_have_weights():
    turns = [{**TURNS[0], "weight": 0}, TURNS[1]]
    [example] = tokenized([{"messages": turns}], chats.make_tokenizer()).rows
    assert trained(example, chats.make_tokenizer()) == [" hello <|im_end|>"]
    with pytest.raises(
        AdapeftError, match=r"message 0 .*, of the user, has 'weight' 0, .*set data.train_on: assistant"
    ):
        tokenized([{"messages": turns}], chats.make_tokenizer(), train_on="all")


def test_texts_get_no_template_and_end():
    tokenizer = chats.make_tokenizer()
    [example] = tokenized([{"prompt": "1 + 1 =", "completion": " 2"}], tokenizer).rows
    assert tokenizer.decode(example["input_ids"]) == "1 + 1 = 2</s>"
    assert trained(example, tokenizer) == [" 2</s>"]


def test_a_token_of_prompt_and_answer_is_trained():
    tokenizer = chats.make_tokenizer(merges=(("=", "2"),))
    [example] = tokenized([{"prompt": "1+1=", "completion": "2"}], tokenizer).rows
    assert trained(example, tokenizer) == ["=2</s>"]


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_long_examples_follow_the_rule_and_are_counted(too_long):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "cdefghij"},
        {"prompt": "abcdefghij", "completion": "k"},
    ]
    found = tokenized(rows, chats.make_tokenizer(), max_length=6, too_long=too_long)
    tokenizer = found.tokenizer
    kept = [(trained(row, tokenizer), row["is_truncated"]) for row in found.rows]
    expected = [(["cd</s>"], False), (["cdef"], True)]
    assert kept == expected[: 2 if too_long == "truncate" else 1]
    assert found.num_truncated == (too_long == "truncate")
    with pytest.raises(AdapeftError, match=r"row 1 .*11 tokens, more than data\.max_length = 6"):
        tokenized(rows, tokenizer, max_length=6, too_long="error")
    with pytest.raises(AdapeftError, match=r"row 1 .*11 tokens, more than data\.max_length = 6"):
        tokenized(rows, tokenizer, max_length=6, too_long="error", invalid="drop")
    with pytest.raises(AdapeftError, match=r"all 1 conversations are dropped; the first is row 0: it has 12 tokens"):
        tokenized(rows[2:], tokenizer, max_length=6, too_long=too_long)


def test_invalid_rows_are_an_error_or_dropped():
    rows = [CHAT, {"messages": TURNS[:1]}, CHAT]
    with pytest.raises(AdapeftError, match=r"row 1 \(counted from 0\): its last message is not the assistant's"):
        tokenized(rows, chats.make_tokenizer())
    assert len(tokenized(rows, chats.make_tokenizer(), invalid="drop")) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_has_the_loss_of_its_examples(side):
    """The oracle is the model's own loss of each example alone, without padding."""
    tokenizer = chats.make_tokenizer()
    tokenizer.padding_side = side
    found = tokenized([CHAT, {"messages": TURNS[:2]}], tokenizer)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=160, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    batch, objective = found.collate([0, 1]), NextToken()
    assert found.tokenizer.padding_side == side
    alone = 0.0
    for row in found.rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        alone += model(input_ids=ids, labels=labels).loss * int((labels[:, 1:] != IGNORED).sum())
    positions = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**batch.inputs, position_ids=positions).logits
    # The model computes its own loss in float32.
    torch.testing.assert_close(objective.loss_sum(logits, batch.labels).float(), alone, rtol=1e-5, atol=0)


def test_packing_is_refused_where_it_cannot_be():
    with pytest.raises(ValidationError, match=r"\(padding: max_length\) cannot be packed; leave out one of the two"):
        TASK.data(train="a.jsonl", evaluation="a.jsonl", packing=True, padding="max_length")
    tree = {
        "model": {"name": "base", "task": "instruct", "attn_implementation": "flash_attention_2", "dtype": "bfloat16"},
        "data": {"train": "a.jsonl", "evaluation": "a.jsonl", "packing": True},
        "cluster": {"gpus_per_worker": 1},
        "output": "run",
    }
    with pytest.raises(
        AdapeftError, match=r"flash_attention_2: in a batch of several rows .* set data\.packing: false"
    ):
        parse_config(tree)
    for attention in ("sdpa", "eager", "flex_attention"):
        tree["model"]["attn_implementation"] = attention
        assert parse_config(tree).data.packed_length == 1024


@pytest.mark.parametrize("packing", [True, False])
def test_examples_share_rows_if_the_config_says_so(packing):
    found = tokenized([CHAT, CHAT], chats.make_tokenizer(), packing=packing)
    assert len(found.collate([0, 1]).labels) == (1 if packing else 2)


def test_a_column_may_be_in_one_split_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    row = {"instruction": "hi", "output": "hello"}
    train = write_lines(tmp_path / "train.jsonl", [{**row, "system": "be short"}])
    evaluation = write_lines(tmp_path / "evaluation.jsonl", [row])
    assert describe(TASK, TASK.data(train=str(train), evaluation=str(evaluation))).num_evaluation == 1


def test_the_cache_knows_every_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = datasets.Dataset.from_list([CHAT])
    kinds = [{}, {"train_on": "all"}, {"max_length": 60}, {"chat_template": chats.TRIMMED}, {"train_on": "completion"}]
    found = []
    for _ in range(2):
        for options in kinds:
            data = TASK.data(train="a.jsonl", evaluation="a.jsonl", **options)
            found.append(TASK.tokenize(rows, data, chats.make_tokenizer(), cache=Cache()).rows[:])
    assert found[: len(kinds)] == found[len(kinds) :]
    assert len({str(one) for one in found}) == len(kinds)
    assert len(list(tmp_path.glob("adapeft/tokens-*"))) >= len(kinds)

"""Tests of prompts: what the model reads, what it is compared with, and which examples are answered."""

from __future__ import annotations

import datasets
import pytest
from pydantic import ValidationError

from adapeft.errors import AdapeftError
from adapeft.tasks.registry import TASKS
from tests.support import chats

TASK = TASKS["instruct"]
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " hello "},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def data_of(**options):
    return TASK.data(train="a.jsonl", evaluation="a.jsonl", **{"generate": "all", **options})


def prompts(rows, tokenizer, **options):
    return TASK.prompts(datasets.Dataset.from_list(rows), data_of(**options), tokenizer)


@pytest.mark.parametrize("template", [chats.CHATML, chats.MARKED, chats.TRIMMED])
def test_the_last_answer_is_asked_for_as_by_transformers(template):
    tokenizer = chats.make_tokenizer(template)
    found = prompts([{"messages": TURNS}, {"messages": TURNS[:2]}], tokenizer)
    for ids, text, turns in zip(found.ids, found.texts, (TURNS[:3], TURNS[:1]), strict=True):
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == asked
        assert text == tokenizer.decode(asked)
    assert found.references == ["so long", "hello"]
    end = "</s>" if template == chats.TRIMMED else "<|im_end|>"
    assert found.ends == {tokenizer.convert_tokens_to_ids(token) for token in ("</s>", end)}


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_messages_after_the_last_answer_are_not_read(train_on):
    row = {"prompt": TURNS[:1], "completion": TURNS[1:3]}
    found = prompts([row], chats.make_tokenizer(), train_on=train_on)
    assert found.texts == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]
    assert found.references == ["hello"]


def test_an_answer_of_weight_0_is_no_reference():
    weighted = [*TURNS[:3], {**TURNS[3], "weight": 0}]
    found = prompts([{"messages": weighted}, {"messages": TURNS[:2]}], chats.make_tokenizer())
    assert (found.examples, found.references) == ([1], ["hello"])


def test_texts_are_read_as_they_are():
    found = prompts([{"prompt": "1 + 1 =", "completion": " 2"}], chats.make_tokenizer())
    assert (found.texts, found.references) == (["1 + 1 ="], ["2"])
    assert found.ends == {chats.make_tokenizer().eos_token_id}


def test_examples_are_the_first_ones_that_fit():
    """Numbers are those of the tokenized examples, without the rows that were dropped."""
    pairs = [("a", ""), ("b", "x"), ("cdefgh", "y"), ("", "z"), ("i", "x" * 9), ("j", "k"), ("l", "m")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    options = {"invalid": "drop", "max_length": 5}
    found = prompts(rows, chats.make_tokenizer(), **options)
    assert found.texts == ["b", "i", "j", "l"]
    kept = TASK.tokenize(datasets.Dataset.from_list(rows), data_of(**options), chats.make_tokenizer()).rows
    decoded = [chats.make_tokenizer().decode(kept[example]["input_ids"])[0] for example in found.examples]
    assert decoded == found.texts
    assert prompts(rows, chats.make_tokenizer(), generate=3, **options).texts == ["b", "i", "j"]
    assert prompts(rows, chats.make_tokenizer(), generate=0, **options) is None
    with pytest.raises(
        AdapeftError, match=r"^data\.generate = all: no prompt .* from 1 to data\.max_length = 5 tokens"
    ):
        prompts([*rows[:1], *rows[3:4]], chats.make_tokenizer(), **options)


def test_a_prompt_beyond_the_longest_example_is_left_out():
    """With the default rule the conversation is kept, for its first answer."""
    long = [*TURNS[:2], {"role": "user", "content": "bye" * 30}, TURNS[3]]
    found = prompts([{"messages": long}, {"messages": TURNS[:2]}], chats.make_tokenizer(), max_length=90)
    assert (found.examples, found.references) == ([1], ["hello"])


def test_a_template_that_rewrites_earlier_answers_is_asked_as_it_writes():
    turns = [TURNS[0], {"role": "assistant", "content": "<think>hm</think>hello"}, *TURNS[2:]]
    tokenizer = chats.make_tokenizer(chats.WITHOUT_EARLIER_THOUGHTS)
    found = prompts([{"messages": turns}], tokenizer, train_on="all")
    assert "think" not in found.texts[0]
    assert found.references == ["so long"]


def test_a_template_that_reorders_messages_is_refused():
    tokenizer = chats.make_tokenizer(chats.LAST_FIRST)
    with pytest.raises(AdapeftError, match=r"^data\.generate: row 0 of data\.evaluation .*writes message 3"):
        prompts([{"messages": TURNS}], tokenizer, train_on="all")


@pytest.mark.parametrize("metric", ["exact_match", "rouge_l", "bleu"])
def test_a_metric_of_answers_needs_answers(metric):
    assert data_of(metric=metric).metric == metric
    with pytest.raises(ValidationError, match=r"compares generated answers; set data\.generate"):
        data_of(metric=metric, generate=0)

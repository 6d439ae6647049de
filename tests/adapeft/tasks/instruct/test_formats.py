"""Tests of the formats of conversations: what is recognized, what it means, what is refused."""

from __future__ import annotations

import json

import pytest

from adapeft.errors import AdapeftError
from adapeft.tasks.instruct.formats import Chat, InvalidRowError, Texts, conversation_of, format_of

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}


def read(row, name="auto", **renamed):
    return conversation_of(row, format_of(row.keys(), "data.train", name, renamed))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER]}, Chat([USER, ANSWER], 1)),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, Chat([SYSTEM, USER, ANSWER, USER, ANSWER], 4)),
        ({"messages": [USER, ANSWER], "tools": [TOOL]}, Chat([USER, ANSWER], 1, [TOOL])),
        ({"messages": [USER, ANSWER], "tools": json.dumps([TOOL])}, Chat([USER, ANSWER], 1, [TOOL])),
        ({"prompt": "1 + 1 =", "completion": " 2"}, Texts("1 + 1 =", " 2")),
        ({"prompt": [USER], "completion": [ANSWER]}, Chat([USER, ANSWER], 1)),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, Chat([USER, ANSWER, USER, ANSWER], 3)),
        ({"instruction": "q", "output": "a"}, Chat([USER, ANSWER], 1)),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, Chat([SYSTEM, USER, ANSWER], 2)),
        (
            {"instruction": "q", "input": "x", "output": "a", "history": [["q", "a"]]},
            Chat([USER, ANSWER, {"role": "user", "content": "q\nx"}, ANSWER], 3),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Chat([SYSTEM, USER, ANSWER], 2),
        ),
    ],
)
def test_a_format_is_recognized_by_its_columns(row, expected):
    assert read(row) == expected
    assert read({**row, "id": 7}) == expected


def test_columns_may_have_other_names():
    assert read({"question": "q", "answer": "a"}, "alpaca", instruction="question", output="answer") == Chat(
        [USER, ANSWER], 1
    )


def test_a_format_can_be_chosen_where_several_fit():
    row = {"prompt": "p", "completion": "c", "instruction": "q", "output": "a"}
    assert read(row) == Texts("p", "c")
    assert read(row, "alpaca") == Chat([USER, ANSWER], 1)


def test_keys_that_arrow_adds_are_removed():
    added = {
        "messages": [{**USER, "tool_calls": None}, {**CALL, "content": None}, {"role": "tool", "content": "9"}, ANSWER]
    }
    assert read(added).messages == [USER, CALL, {"role": "tool", "content": "9"}, ANSWER]


@pytest.mark.parametrize(
    ("columns", "name", "renamed", "message"),
    [
        (["question"], "auto", {}, "no format of conversations has its columns 'question'"),
        (["instruction"], "alpaca", {}, "data.columns.output = 'output': data.train has no such column"),
        (["instruction", "output"], "alpaca", {"answer": "output"}, "the format has no column 'answer'"),
        (["instruction", "output"], "alpaca", {"input": "inputs"}, "data.columns.input = 'inputs'"),
    ],
)
def test_a_missing_column_is_named(columns, name, renamed, message):
    with pytest.raises(AdapeftError, match=message):
        format_of(columns, "data.train", name, renamed)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "message 1 .*, of the assistant, is empty"),
        ({"messages": [USER]}, "last message is not the assistant's"),
        ({"messages": []}, "last message is not the assistant's"),
        ({"messages": [USER, ANSWER, USER]}, "last message is not the assistant's"),
        ({"messages": [ANSWER, USER, ANSWER]}, "message 0 .* out of order at the start"),
        ({"messages": [SYSTEM, ANSWER]}, "message 1 .* out of order after one of the system"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "message 1 .*, of the system, is out of order"),
        ({"messages": [USER, ANSWER, ANSWER]}, "message 2 .*, of the assistant, is out of order"),
        ({"messages": [USER, {"role": "tool", "content": "9"}, ANSWER]}, "message 1 .*, of the tool, is out of order"),
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, "'role' is 'bot'"),
        ({"messages": "q"}, "'messages' is not a list"),
        ({"messages": None}, "'messages' is not a list"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "'tools' is not JSON"),
        ({"prompt": "q", "completion": [ANSWER]}, "is a text, the other is not"),
        ({"prompt": "q", "completion": ""}, "completion is empty"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "'from' is 'robot'"),
        ({"instruction": "q", "output": None}, "message 1 .*, of the assistant, is empty"),
    ],
)
def test_an_invalid_row_is_refused(row, message):
    with pytest.raises(InvalidRowError, match=message):
        read(row)

"""Tests of the formats of conversations: what is recognized, what it means, what is refused."""

from __future__ import annotations

import json

import pytest

from adapeft.errors import AdapeftError
from adapeft.tasks.instruct.formats import Chat, Texts, conversation_of, format_of
from adapeft.tasks.rows import InvalidRowError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "9"}


def call(arguments):
    """Return a message of the assistant that calls a tool, as OpenAI writes it."""
    function = {"name": "at", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def parts(*given, role="user"):
    return {"role": role, "content": list(given)}


def turn(role, value, **more):
    return {"from": role, "value": value, **more}


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
        ({"conversations": [SYSTEM, USER, ANSWER]}, Chat([SYSTEM, USER, ANSWER], 2)),
        ({"conversations": [turn("human", "q"), turn("gpt", "a", weight=0)]}, Chat([USER, {**ANSWER, "weight": 0}], 1)),
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


def test_arguments_in_json_become_an_object():
    """Templates write them by ``tojson``, which would put the text of an object in quotes."""
    hour = {"hour": 9, "zone": None, "names": ["é"]}
    for arguments in (json.dumps(hour), {key: value for key, value in hour.items() if value is not None}):
        found = read({"messages": [USER, call(arguments), RESULT, ANSWER]}).messages[1]
        assert found == call(hour if isinstance(arguments, str) else arguments)
    short = {"role": "assistant", "tool_calls": [{"name": "at", "arguments": "{}"}]}
    assert read({"messages": [USER, short]}).messages[1]["tool_calls"] == [{"name": "at", "arguments": {}}]


def test_nulls_in_json_are_kept():
    """Those that Arrow adds to tools are removed."""
    schema = {"type": "function", "function": {"name": "at", "parameters": {"default": None}}}
    assert read({"messages": [USER, ANSWER], "tools": json.dumps([schema])}).tools == [schema]
    removed = {"type": "function", "function": {"name": "at", "parameters": {}}}
    assert read({"messages": [USER, ANSWER], "tools": [schema]}).tools == [removed]


def test_parts_of_text_are_joined():
    text, more = {"type": "text", "text": "q", "image_url": None}, {"type": "text", "text": " r"}
    row = {"messages": [parts(text, more), parts({"type": "text", "text": "a"}, role="assistant")]}
    assert read(row).messages == [{"role": "user", "content": "q r"}, ANSWER]


def test_calls_of_llama_factory_become_tool_calls():
    function, other = {"name": "at", "arguments": {"hour": 9}}, {"name": "now", "arguments": {}}
    called = [{"type": "function", "function": one} for one in (function, other)]
    schema = {"name": "at", "parameters": {}}
    for value, expected in (
        (json.dumps(function), called[:1]),
        (json.dumps([function, other]), called),
        (json.dumps({**function, "arguments": json.dumps(function["arguments"])}), called[:1]),
    ):
        turns = [turn("human", "q"), turn("function_call", value), turn("observation", "9"), turn("gpt", "a")]
        roles = [{"role": one["from"], "content": one["value"]} for one in turns]
        for conversation in (turns, roles):
            found = read({"conversations": conversation, "tools": json.dumps([schema])})
            calls = {"role": "assistant", "tool_calls": expected}
            assert found == Chat([USER, calls, RESULT, ANSWER], 3, [{"type": "function", "function": schema}])


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
        ({"conversations": [{"role": "robot", "content": "a"}]}, "'role' is 'robot'"),
        ({"messages": [USER, call("{")]}, r"message 1 .*: tool_calls\[0\].function.arguments is '{', not JSON"),
        ({"messages": [USER, call("[1]")]}, r"tool_calls\[0\].function.arguments is \[1\], not a JSON object"),
        ({"messages": [USER, call(1)]}, r"tool_calls\[0\].function.arguments is 1, not a JSON object"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "[]"}]}, "'tool_calls' is '\\[\\]', not a list"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": "at"}]}]},
            r"tool_calls\[0\].function is 'at', not",
        ),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "at"}}]}, "'function_call' is OpenAI's former field"),
        ({"messages": [parts({"type": "image_url", "image_url": {}}), ANSWER]}, "a part of type 'image_url'"),
        ({"messages": [parts({"type": "text"}), ANSWER]}, "a part of type 'text' without a text"),
        ({"messages": [parts("q"), ANSWER]}, "a part of type 'q'"),
        ({"messages": [parts({"type": "text", "text": " "}), ANSWER]}, "message 0 .*, of the user, is empty"),
        ({"messages": [USER, {**ANSWER, "content": {"a": 1}}]}, "'content' is {'a': 1}, neither a text nor"),
        *(
            ({"messages": [USER, {**ANSWER, "weight": weight}]}, f"'weight' is {weight!r}, neither 0 .* nor 1")
            for weight in (0.5, 2, "0", True)
        ),
        ({"messages": [USER, ANSWER], "tools": {"name": "at"}}, "'tools' is {'name': 'at'}, not a list of objects"),
        ({"conversations": [turn("human", "q"), turn("function_call", "at()")]}, "'value' of turn 1 .*not JSON"),
        (
            {"conversations": [turn("human", "q"), turn("function_call", '{"name": "at"}')]},
            "'value' of turn 1 .* not a JSON object with 'name' and 'arguments'",
        ),
        (
            {"conversations": [turn("human", "q"), turn("function_call", '{"name": "at", "arguments": 1}')]},
            "arguments is 1, not a JSON object",
        ),
        ({"instruction": "q", "output": None}, "message 1 .*, of the assistant, is empty"),
        ({"instruction": None, "output": "a"}, "message 0 .*, of the user, is empty"),
        ({"instruction": "q", "output": 5}, "'output' is 5, not a text"),
        ({"instruction": ["q"], "output": "a"}, r"'instruction' is \['q'\], not a text"),
        ({"instruction": "q", "output": "a", "system": {"a": 1}}, "'system' is {'a': 1}, not a text"),
        *(
            ({"instruction": "q", "output": "a", "history": history}, "'history' is .*, not a list of pairs of texts")
            for history in ([["q"]], [["q", "a", "b"]], ["qa"], [["q", None]], "qa", {"q": "a"}, [{"q": "a"}], [None])
        ),
        ({"messages": [{"content": "q"}, ANSWER]}, "message 0 .*: 'role' is None, not one of"),
        ({"messages": [{"role": ["user"], "content": "q"}, ANSWER]}, r"message 0 .*: 'role' is \['user'\], not one of"),
        ({"messages": [{**USER, "content": None}, ANSWER]}, "message 0 .*, of the user, is empty"),
        ({"messages": [USER, None]}, "'messages' is not a list of messages"),
        ({"messages": [USER, {**ANSWER, "content": 5}]}, "message 1 .*: 'content' is 5, neither a text nor"),
        ({"messages": [USER, ANSWER], "tools": 5}, "'tools' is 5, not a list of objects"),
        ({"messages": [USER, ANSWER], "tools": ["at"]}, r"'tools' is \['at'\], not a list of objects"),
        ({"messages": [USER, ANSWER], "tools": '{"name": "at"}'}, "'tools' is {'name': 'at'}, not a list of objects"),
        ({"prompt": None, "completion": None}, "'prompt' is not a list of messages"),
        ({"prompt": [USER], "completion": ANSWER}, "'completion' is not a list of messages"),
        ({"conversations": None}, "'conversations' is not a list of messages"),
        ({"conversations": [turn("human", "q"), "a"]}, "'conversations' is not a list of messages"),
        ({"conversations": [{"value": "q"}, turn("gpt", "a")]}, "turn 0 .*: 'from' is None, not one of"),
        ({"conversations": [{"from": ["human"], "value": "q"}, turn("gpt", "a")]}, r"turn 0 .*: 'from' is \['human'\]"),
        ({"conversations": [turn("human", None), turn("gpt", "a")]}, "message 0 .*, of the user, is empty"),
        ({"conversations": [turn("human", 5), turn("gpt", "a")]}, "message 0 .*: 'content' is 5, neither a text nor"),
        (
            {"conversations": [turn("human", "q"), turn("gpt", "a")], "system": 5},
            "message 0 .*: 'content' is 5, neither a text nor",
        ),
    ],
)
def test_an_invalid_row_is_refused(row, message):
    with pytest.raises(InvalidRowError, match=message):
        read(row)

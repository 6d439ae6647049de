"""Conversations: the formats in which data sets hold prompts and answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.tasks.instruct.messages import (
    Message,
    check_order,
    function_calls,
    messages_of,
    without_none,
)
from adapeft.tasks.rows import InvalidRowError

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Role of a turn → role of its message."""


@dataclass(frozen=True)
class Chat:
    """A conversation that a chat template turns into text.

    Attributes:
        messages: messages in the format of OpenAI and of transformers' chat templates.
        num_prompt: number of messages before the completion.
        tools: JSON schemas of the tools that the assistant may call; None if there are none.
    """

    messages: list[Message]
    num_prompt: int
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Texts:
    """A prompt and its completion as plain texts, which no template changes."""

    prompt: str
    completion: str


Conversation = Chat | Texts


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        required: columns by which the format is recognized.
        optional: columns that are read if they exist.
        read: function that makes a conversation of a row, given by these names of columns.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Conversation]


def _of_messages(row: Mapping[str, Any]) -> Conversation:
    messages = messages_of(row["messages"], "messages")
    last_read = max((place for place, one in enumerate(messages, 1) if one["role"] != "assistant"), default=0)
    return Chat(messages, last_read, _tools(row))


def _of_pair(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Texts(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise InvalidRowError(
            "one of 'prompt' and 'completion' is a text, the other is not. Give two texts or two lists"
        )
    before = messages_of(prompt, "prompt")
    return Chat(before + messages_of(completion, "completion"), len(before), _tools(row))


def _of_alpaca(row: Mapping[str, Any]) -> Conversation:
    texts = {column: row.get(column) or "" for column in ("system", "instruction", "input", "output")}
    for column, text in texts.items():
        if not isinstance(text, str):
            raise InvalidRowError(f"{column!r} is {text!r:.80}, not a text")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise InvalidRowError(f"'history' is {history!r:.80}, not a list of pairs of texts, a question and its answer")
    messages = [_message("system", texts["system"])] if texts["system"] else []
    for question, answer in history:
        messages += [_message("user", question), _message("assistant", answer)]
    asked = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages += [_message("user", asked), _message("assistant", texts["output"])]
    return Chat(messages, len(messages) - 1)


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _of_sharegpt(row: Mapping[str, Any]) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InvalidRowError("'conversations' is not a list of messages")
    for place, given in enumerate(turns):
        turn = without_none(given)
        role_key, value_key = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
        role, value = turn.pop(role_key, None), turn.pop(value_key, None)
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise InvalidRowError(
                f"turn {place} (counted from 0): {role_key!r} is {role!r}, not one of {known}. Convert the row to "
                "'messages'"
            )
        if role == "function_call":
            turn["tool_calls"] = function_calls(value, f"{value_key!r} of turn {place} (counted from 0)")
        else:
            turn["content"] = value
        messages.append({**turn, "role": _SHAREGPT_ROLES[role]})
    tools = _tools(row)
    return _of_messages({**row, "messages": messages, "tools": tools and [_with_type(tool) for tool in tools]})


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("tools",), _of_messages),
    "prompt-completion": Format(("prompt", "completion"), ("tools",), _of_pair),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _of_alpaca),
    "sharegpt": Format(("conversations",), ("system", "tools"), _of_sharegpt),
}
"""Formats by name, in the order in which they are looked for."""


def format_of(columns: Collection[str], split: str, name: str, renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of a data set's format, its own name → that in the data, the required ones first.

    Args:
        columns: columns of the data.
        split: field of the config that names the data.
        name: name of the format; ``auto``: the first whose required columns exist.
        renamed: column of the format → column of the data, where they differ.

    Raises:
        AdapeftError: the data has no format, or lacks a column of it.
    """
    one = FORMATS[_recognized(columns, split, renamed) if name == "auto" else name]
    known = (*one.required, *one.optional)
    for own in renamed:
        if own not in known:
            raise AdapeftError(
                f"data.columns: the format has no column {own!r}.{did_you_mean(own, known)} It has {', '.join(known)}."
            )
    named = {own: renamed.get(own, own) for own in known}
    for own, column in named.items():
        if column not in columns and (own in one.required or own in renamed):
            raise AdapeftError(
                f"data.columns.{own} = {column!r}: {split} has no such column.{did_you_mean(column, columns)} It has "
                f"{', '.join(map(repr, columns))}."
            )
    return {own: column for own, column in named.items() if column in columns}


def _recognized(columns: Collection[str], split: str, renamed: Mapping[str, str]) -> str:
    """Return the first format whose required columns exist."""
    for name, one in FORMATS.items():
        if all(renamed.get(own, own) in columns for own in one.required):
            return name
    formats = "; ".join(" and ".join(map(repr, one.required)) for one in FORMATS.values())
    raise AdapeftError(
        f"{split}: no format of conversations has its columns {', '.join(map(repr, columns))}. The formats have "
        f"{formats}. Set data.format and data.columns, such as format: alpaca, columns: {{instruction: question, "
        "output: answer}."
    )


def conversation_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """Return the conversation in a row.

    Args:
        row: values by column of the data.
        columns: result of ``format_of``.

    Raises:
        InvalidRowError: a text is missing, or the messages are not in an order that a model can be trained on.
    """
    read = next(one.read for one in FORMATS.values() if set(one.required) <= columns.keys())
    found = read({own: row[column] for own, column in columns.items()})
    if isinstance(found, Texts):
        if not found.completion.strip():
            raise InvalidRowError("its completion is empty. Drop such rows, or set data.invalid: drop")
        return found
    check_order(found.messages)
    if found.num_prompt == len(found.messages):
        raise InvalidRowError("its last message is not the assistant's. Drop such rows, or set data.invalid: drop")
    return found


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise InvalidRowError(f"'tools' is not JSON: {error}") from error
    else:
        tools = without_none(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRowError(f"'tools' is {tools!r:.80}, not a list of objects")
    return tools


def _with_type(tool: Any) -> Any:
    """Return the schema of a tool as templates read it; LLaMA-Factory writes only that of its function."""
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}

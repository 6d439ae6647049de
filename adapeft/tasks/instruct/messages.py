"""Messages as transformers' chat templates read them, and their checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapeft.tasks.rows import InvalidRowError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


def messages_of(value: Any, column: str) -> list[Message]:
    """Return messages whose contents are texts, and whose tool calls have objects as arguments.

    Raises:
        InvalidRowError: a message has a form that cannot be converted. Names its field.
    """
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise InvalidRowError(f"{column!r} is not a list of messages with 'role' and 'content'")
    # Arrow gives every message the keys of all messages, with None where a message did not have them.
    return [_message(without_none(message), place) for place, message in enumerate(value)]


def without_none(value: Any) -> Any:
    """Return the value without the keys of mappings that have no value."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def function_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the tool calls in LLaMA-Factory's form: JSON of a name with arguments, or of a list of several.

    Raises:
        InvalidRowError: the value has another form.
    """
    found = _parsed(value, where)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls):
        raise InvalidRowError(f"{where} is {found!r:.80}, not a JSON object with 'name' and 'arguments'")
    return [{"type": "function", "function": dict(call)} for call in calls]


def is_trained(message: Message) -> bool:
    """Return whether the message is trained, where ``data.train_on`` names its role: its OpenAI weight is not 0."""
    return bool(message.get("weight", 1))


def check_order(messages: list[Message]) -> None:
    """Check that every message has content, and follows one that it can follow.

    Raises:
        InvalidRowError: it does not. Says which message.
    """
    for place, message in enumerate(messages):
        role, before = message["role"], messages[place - 1] if place else None
        if not _has_content(message):
            raise InvalidRowError(
                f"message {place} (counted from 0), of the {role}, is empty. Drop such rows, or set data.invalid: drop"
            )
        is_first = before is None or all(one["role"] in ("system", "developer") for one in messages[:place])
        in_order = {
            "system": is_first,
            "developer": is_first,
            "user": True,
            "assistant": not is_first and (before is None or before["role"] != "assistant"),
            "tool": before is not None and ("tool_calls" in before or before["role"] in ("tool", "assistant")),
        }
        if not in_order[role]:
            after = "at the start" if before is None else f"after one of the {before['role']}"
            raise InvalidRowError(
                f"message {place} (counted from 0), of the {role}, is out of order {after}. Correct or drop such rows, "
                "or set data.invalid: drop"
            )


def _message(message: Message, place: int) -> Message:
    where = f"message {place} (counted from 0)"
    if message.get("role") not in ROLES:
        raise InvalidRowError(f"{where}: 'role' is {message.get('role')!r}, not one of {', '.join(ROLES)}")
    if "function_call" in message:
        raise InvalidRowError(f"{where}: 'function_call' is OpenAI's former field; write the call to 'tool_calls'")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InvalidRowError(f"{where}: 'weight' is {weight!r}, neither 0 (not trained) nor 1 (trained)")
    if "content" in message:
        message["content"] = _text(message["content"], where)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
    return message


def _text(content: Any, where: str) -> str:
    """Return the content of a message: a text, or OpenAI's list of parts, whose texts are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRowError(
            f"{where}: 'content' is {content!r:.80}, neither a text nor a list of parts. Write it as a text, such as "
            "JSON"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text":
            raise InvalidRowError(
                f"{where}: 'content' has a part of type {kind!r:.80}; only parts of type 'text' are supported"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRowError(f"{where}: 'content' has a part of type 'text' without a text in 'text'")
    return "".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidRowError(f"{where}: 'tool_calls' is {calls!r:.80}, not a list of objects")
    found = []
    for number, call in enumerate(calls):
        name = f"{where}: tool_calls[{number}]"
        if "function" in call:
            found.append({**call, "function": _function(call["function"], f"{name}.function")})
        else:  # the short form, which many templates also read
            found.append(_function(call, name))
    return found


def _function(function: Any, name: str) -> dict[str, Any]:
    """Return a called function with its arguments as an object, which OpenAI writes as JSON in a text."""
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRowError(f"{name} is {function!r:.80}, not an object with the 'name' of a function")
    if "arguments" not in function:
        return dict(function)
    arguments = _parsed(function["arguments"], f"{name}.arguments")
    if not isinstance(arguments, Mapping):
        raise InvalidRowError(f"{name}.arguments is {arguments!r:.80}, not a JSON object")
    return {**function, "arguments": arguments}


def _parsed(value: Any, name: str) -> Any:
    """Return what the JSON in a text holds; another value is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InvalidRowError(f"{name} is {value!r:.80}, not JSON: {error}") from error


def _has_content(message: Message) -> bool:
    content = message.get("content")
    is_filled = bool(content.strip()) if isinstance(content, str) else bool(content)
    return is_filled or (message["role"] == "assistant" and bool(message.get("tool_calls")))

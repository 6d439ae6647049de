"""Chat templates: the text of a conversation, and where in it the assistant speaks."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from adapeft.errors import AdapeftError
from adapeft.tasks.instruct.formats import Chat
from adapeft.tasks.rows import InvalidRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]
"""Characters of a text: the first, and the one after the last."""

_GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")


class ChatTemplate:
    """The chat template that the config names, or the tokenizer's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._tokenizer, self._template = tokenizer, template

    def spans(self, chat: Chat) -> tuple[str, Spans]:
        """Return the text of a conversation, and the span of each message of the assistant.

        The template marks them by ``{% generation %}``, as in transformers and TRL. Otherwise they are found from the
        texts of the conversation up to each message.

        Raises:
            AdapeftError: there is no template.
            InvalidRowError: the template rejects the messages, or the spans cannot be found.
        """
        turns = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not _GENERATION.search(self._source(chat)):
            text = self.text(chat)
            return text, [self._span(chat, turn, text) for turn in turns]
        text, spans = self._render(chat, len(chat.messages), return_assistant_tokens_mask=True)
        if len(spans) != len(turns):
            raise InvalidRowError(
                f"the chat template marks {len(spans)} generations for {len(turns)} messages of the assistant. Correct "
                "its generation blocks, or set data.train_on: all"
            )
        return text, spans

    def last_answer(self, chat: Chat) -> tuple[str, str]:
        """Return the text that asks for the assistant's last message, and the text of that message with its end.

        Raises:
            AdapeftError: there is no template.
            InvalidRowError: the template rejects the messages, or writes them otherwise than up to that message.
        """
        turn = max(place for place, message in enumerate(chat.messages) if message["role"] == "assistant")
        until = replace(chat, messages=chat.messages[: turn + 1])
        asked = self.text(chat, turn, ask=True)
        if _GENERATION.search(self._source(chat)):
            text, spans = self.spans(until)
            start, end = spans[-1]
        else:
            text = self.text(until)
            start, end = self._span(until, turn, text)
        return asked, text[start:end]

    def text(self, chat: Chat, num_messages: int | None = None, *, ask: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            chat: the conversation.
            num_messages: number of its messages; None for all.
            ask: whether to end with what makes the model answer.

        Raises:
            AdapeftError: there is no template.
            InvalidRowError: the template rejects the messages.
        """
        return self._render(chat, num_messages or len(chat.messages), add_generation_prompt=ask)[0]

    def _source(self, chat: Chat) -> str:
        if self._template is not None:
            return self._template
        try:
            return self._tokenizer.get_chat_template(tools=chat.tools)
        except ValueError as error:
            raise AdapeftError(
                "model.name: its tokenizer has no chat template, which turns messages into text. Set "
                "data.chat_template to a file.jinja, or train on texts (columns prompt and completion)."
            ) from error

    def _render(self, chat: Chat, num_messages: int, **options: Any) -> tuple[str, Spans]:
        source = self._source(chat)
        if any(message.get("tool_calls") for message in chat.messages) and not re.search(r"\btool_calls\b", source):
            raise InvalidRowError(
                "the chat template does not write the 'tool_calls' of its messages. Give one that does in "
                "data.chat_template, or drop such rows, or set data.invalid: drop"
            )
        options.update(self._tokenizer.special_tokens_map)
        try:
            rendered: Any = render_jinja_template(
                [chat.messages[:num_messages]], chat.tools, chat_template=source, **options
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            needs_tools = chat.tools is None and re.search(r"\btools\b", source)
            hint = " The template reads tools, of which the row has none (column 'tools')." if needs_tools else ""
            raise InvalidRowError(
                f"the chat template rejects it: {str(error).rstrip('.')}.{hint} Correct or drop such rows, or set "
                "data.invalid: drop"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _span(self, chat: Chat, turn: int, text: str) -> tuple[int, int]:
        """Return where a message of the assistant stands in the whole text, without blanks after it.

        Raises:
            InvalidRowError: the text of this message, or of those before it, depends on later messages.
        """
        before = self.text(chat, turn, ask=True)
        # At the end of a conversation templates may write what they do not write between two messages.
        is_last = turn == len(chat.messages) - 1
        end = len(text) if is_last else _common_length(self.text(chat, turn + 1), text)
        said, content = text[len(before) : end], chat.messages[turn].get("content")
        has_content = not isinstance(content, str) or content.strip() in said
        if not text.startswith(before) or not has_content:
            raise InvalidRowError(
                f"the chat template writes message {turn} (counted from 0), or one before it, otherwise in the whole "
                "conversation than up to there, so that it is unknown what the assistant writes. Give a template with "
                "generation blocks in data.chat_template, or set data.train_on: all"
            )
        return len(before), len(before) + len(said.rstrip())


def _common_length(one: str, other: str) -> int:
    """Return the number of characters with which both texts start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))

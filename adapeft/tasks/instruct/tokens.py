"""Tokens of conversations, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import datasets

from adapeft.data.cache import Cache, Progress
from adapeft.data.streams import Rows
from adapeft.tasks.instruct.formats import Chat, Conversation, Texts, conversation_of
from adapeft.tasks.instruct.messages import is_trained
from adapeft.tasks.instruct.section import InstructData
from adapeft.tasks.instruct.template import ChatTemplate, Spans
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.rows import REMEDY, DroppedError, InvalidRowError, RefusedError, RowFilter
from adapeft.tasks.tokens.tokenize import LABELS, TRUNCATED, batches_of, check_fast, made

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 3
"""Version of the cached tokens; raised when the same rows give others."""


def conversations_of(
    rows: Rows,
    columns: Mapping[str, str],
    data: InstructData,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache | None = None,
) -> datasets.Dataset:
    """Tokenize one conversation per row; tokens that ``data.train_on`` does not name have the label -100.

    Args:
        rows: rows with conversations.
        columns: columns of their format, as ``format_of`` returns them.
        data: the config's ``data`` section.
        tokenizer: tokenizer of the model.
        cache: cache of this machine; None: in memory.

    Raises:
        AdapeftError: the config's rules refuse a row, there is no chat template, the tokenizer does not tell the places
            of its tokens, or no row is left.
    """
    check_fast(tokenizer, "which characters a token holds, by which the trained tokens are found")
    encode = Encoder(data, tokenizer)

    def encoded(progress: Progress) -> Iterator[dict[str, list[Any]]]:
        keep = RowFilter(data.invalid)
        for batch in batches_of(rows, list(columns.values()), progress):
            given = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
            if kept := keep.examples(given, lambda row: encode(conversation_of(row, columns))):
                yield {name: [example[name] for example in kept] for name in kept[0]}
        keep.check_any("conversations")

    rules = data.model_dump(include={"max_length", "too_long", "invalid", "train_on", "chat_template"})
    key = {"kind": "conversations", "version": _VERSION, "format": dict(columns), **rules}
    return made(encoded, key, rows, list(columns.values()), tokenizer, cache)


class Encoder:
    """Conversion of a conversation to token ids and labels, by the rules of the config."""

    def __init__(self, data: InstructData, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._template = ChatTemplate(tokenizer, data.chat_template)

    def __call__(self, conversation: Conversation) -> dict[str, Any]:
        """Return the columns of an example.

        Raises:
            AdapeftError: there is no template.
            InvalidRowError: the template rejects it, no token of it is trained, or it is too long and ``data.too_long``
                is ``error``.
            DroppedError: it is too long, and is dropped or has no trained token left.
        """
        ids, labels = self._tokens(conversation)
        most, is_long = self._data.max_length, len(ids) > self._data.max_length
        said = f"it has {len(ids)} tokens, more than data.max_length = {most}"
        if is_long and self._data.too_long == "error":
            raise RefusedError(f"{said}. Raise that, or set data.too_long: truncate or drop")
        if is_long and self._data.too_long == "drop":
            raise DroppedError(said)
        ids, labels = ids[:most], labels[:most]
        if all(label == IGNORED for label in labels[1:]):
            if is_long:
                raise DroppedError(f"{said}, and none of the first {most} is trained")
            raise InvalidRowError(f"no token of it is trained. {REMEDY}")
        return {"input_ids": ids, "attention_mask": [1] * len(ids), LABELS: labels, TRUNCATED: is_long}

    def _tokens(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Return token ids and labels of the same length.

        A token with the end of a prompt and the start of an answer is trained: nothing else would teach that start.
        """
        is_text = isinstance(conversation, Texts)
        text, spans = self._trained(conversation)
        found = self._tokenizer(text, add_special_tokens=is_text, return_offsets_mapping=True, verbose=False)
        ids = list(found["input_ids"])
        trained = [any(start < last and first < end for first, last in spans) for start, end in found["offset_mapping"]]
        end = self._tokenizer.eos_token_id
        if is_text and end is not None:
            if ids[-1] != end:
                ids.append(end)
                trained.append(True)
            trained[-1] = True
        return ids, [token if one else IGNORED for token, one in zip(ids, trained, strict=True)]

    def _trained(self, conversation: Conversation) -> tuple[str, Spans]:
        """Return the text of a conversation and the spans of it that are trained."""
        train_on = self._data.train_on
        if isinstance(conversation, Texts):
            text = conversation.prompt + conversation.completion
            return text, [(0 if train_on == "all" else len(conversation.prompt), len(text))]
        if train_on == "all":
            return self._all_but_left_out(conversation)
        text, spans = self._template.spans(conversation)
        first = conversation.num_prompt if train_on == "completion" else 0
        turns = zip(_answers(conversation), spans, strict=True)
        return text, [span for turn, span in turns if turn >= first and is_trained(conversation.messages[turn])]

    def _all_but_left_out(self, chat: Chat) -> tuple[str, Spans]:
        """Return the text of a chat, and what of it is outside the answers of weight 0."""
        left_out = {place for place, message in enumerate(chat.messages) if not is_trained(message)}
        if not left_out:
            text = self._template.text(chat)
            return text, [(0, len(text))]
        if others := left_out.difference(_answers(chat)):
            raise InvalidRowError(
                f"message {min(others)} (counted from 0), of the {chat.messages[min(others)]['role']}, has 'weight' 0, "
                "which data.train_on: all takes for the assistant's messages only. Remove it, or set data.train_on: "
                "assistant"
            )
        text, spans = self._template.spans(chat)
        skipped = [span for turn, span in zip(_answers(chat), spans, strict=True) if turn in left_out]
        starts, ends = [0, *(end for _, end in skipped)], [*(start for start, _ in skipped), len(text)]
        return text, list(zip(starts, ends, strict=True))


def _answers(chat: Chat) -> list[int]:
    """Return the places of the assistant's messages."""
    return [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]

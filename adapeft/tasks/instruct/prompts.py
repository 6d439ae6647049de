"""Prompts of conversations: everything before the assistant's last message, which is the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import datasets

from adapeft.errors import AdapeftError
from adapeft.tasks.generation import Prompts
from adapeft.tasks.instruct.formats import Conversation, Texts, conversation_of
from adapeft.tasks.instruct.messages import is_trained
from adapeft.tasks.instruct.section import InstructData
from adapeft.tasks.instruct.template import ChatTemplate
from adapeft.tasks.instruct.tokens import Encoder
from adapeft.tasks.rows import DroppedError, InvalidRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts_of(
    rows: datasets.Dataset, columns: Mapping[str, str], data: InstructData, tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    """Return the prompts of the first ``data.generate`` conversations.

    Left out are prompts beyond ``data.max_length``, and those whose answer has weight 0.

    Args:
        rows: rows with conversations, which ``conversations_of`` accepts.
        columns: columns of their format.
        data: the config's ``data`` section.
        tokenizer: tokenizer that can pad.

    Raises:
        AdapeftError: the template writes a prompt otherwise than the conversation begins, or no prompt is left.
    """
    template = ChatTemplate(tokenizer, data.chat_template)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids, texts, references, examples, ends = [], [], [], [], {tokenizer.eos_token_id} - {None}
    for example, (row, conversation) in enumerate(_kept(rows, columns, data, tokenizer)):
        if not _has_reference(conversation):
            continue
        try:
            prompt, reference = _texts(conversation, template)
        except InvalidRowError as error:
            raise AdapeftError(f"data.generate: row {row} of data.evaluation (counted from 0): {error}.") from error
        tokens = _prompt_tokens(prompt, tokenizer, is_text=isinstance(conversation, Texts))
        if not 0 < len(tokens) <= data.max_length:
            continue
        answer = tokenizer(reference, add_special_tokens=False, verbose=False)["input_ids"]
        ends |= {answer[-1]} & special
        ids.append(tokens)
        texts.append(prompt)
        references.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
        examples.append(example)
        if data.generate != "all" and len(ids) == data.generate:
            break
    if not ids:
        raise AdapeftError(
            f"data.generate = {data.generate}: no prompt of data.evaluation has from 1 to data.max_length = "
            f"{data.max_length} tokens and an answer whose weight is not 0. Raise data.max_length, or leave "
            "data.generate out."
        )
    return Prompts(ids, texts, references, examples, frozenset(ends), data.max_new_tokens, tokenizer)


def _kept(
    rows: datasets.Dataset, columns: Mapping[str, str], data: InstructData, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, Conversation]]:
    """Yield the rows that are examples and their numbers."""
    encode = Encoder(data, tokenizer)
    for number, row in enumerate(rows.select_columns(list(columns.values()))):
        try:
            conversation = conversation_of(row, columns)
            encode(conversation)
        except (InvalidRowError, DroppedError):
            continue
        yield number, conversation


def _has_reference(conversation: Conversation) -> bool:
    """Return whether the last answer is one to learn."""
    if isinstance(conversation, Texts):
        return True
    return is_trained(next(one for one in reversed(conversation.messages) if one["role"] == "assistant"))


def _texts(conversation: Conversation, template: ChatTemplate) -> tuple[str, str]:
    """Return the text of the prompt, and that of the answer with what ends it."""
    if isinstance(conversation, Texts):
        return conversation.prompt, conversation.completion
    return template.last_answer(conversation)


def _prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, is_text: bool) -> list[int]:
    """Return the tokens of a prompt, without those with which some tokenizers end every text."""
    found = tokenizer(text, add_special_tokens=is_text, return_special_tokens_mask=True, verbose=False)
    ids, is_added = list(found["input_ids"]), found["special_tokens_mask"]
    while is_text and ids and is_added[len(ids) - 1]:
        ids.pop()
    return ids

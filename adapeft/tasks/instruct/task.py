"""Instruction tuning on conversations: chats, prompts with completions, Alpaca's and ShareGPT's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapeft.tasks.answers import AnswerMetrics
from adapeft.tasks.causal_lm import NextTokenTask
from adapeft.tasks.instruct.section import InstructData
from adapeft.tasks.metrics.metrics import Metrics

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache
    from adapeft.data.description import DataDescription
    from adapeft.data.streams import Rows
    from adapeft.tasks.generation import Prompts
    from adapeft.tasks.tokens.tokenize import TokenizedData


class InstructMetrics(AnswerMetrics):
    """Metrics of conversations."""

    of = "instruct"


class Instruct(NextTokenTask[InstructData]):
    """Instruction tuning; an example is a conversation, and its labels are the tokens that the assistant wrote."""

    data = InstructData
    drops_rows = True

    def columns(self, rows: Rows, split: str, data: InstructData) -> list[str]:
        from adapeft.tasks.instruct.formats import format_of

        return list(format_of(rows.column_names, split, data.format, dict(data.columns)).values())

    def tokenize(
        self,
        rows: Rows,
        data: InstructData,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        from adapeft.data.padding import with_padding
        from adapeft.tasks.instruct.formats import format_of
        from adapeft.tasks.instruct.tokens import conversations_of
        from adapeft.tasks.tokens.tokenize import TokenizedData

        tokenizer = with_padding(tokenizer)
        columns = format_of(rows.column_names, "data.train", data.format, dict(data.columns))
        examples = conversations_of(rows, columns, data, tokenizer, cache)
        return TokenizedData(examples, None, tokenizer, data.fixed_length, packed_length=data.packed_length)

    def metrics(self, description: DataDescription) -> Metrics:
        return InstructMetrics()

    def prompts(self, rows: datasets.Dataset, data: InstructData, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
        if not data.generate:
            return None
        from adapeft.data.padding import with_padding
        from adapeft.tasks.instruct.formats import format_of
        from adapeft.tasks.instruct.prompts import prompts_of

        columns = format_of(rows.column_names, "data.evaluation", data.format, dict(data.columns))
        return prompts_of(rows, columns, data, with_padding(tokenizer))

    def summary(self, description: DataDescription, data: InstructData) -> str:
        trained = {"completion": "last answers", "assistant": "answers", "all": "all tokens"}[data.train_on]
        return (
            f"{description.training} training conversations, {description.num_evaluation:,} evaluation "
            f"conversations; {trained} are trained"
        )

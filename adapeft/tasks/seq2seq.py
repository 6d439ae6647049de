"""Sequence to sequence: an encoder reads a source, and a decoder writes the target."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from adapeft.errors import AdapeftError
from adapeft.sections.data import AnsweredData, Generated, Invalid, NewTokens, Padding, StreamableData
from adapeft.sections.section import Harmless
from adapeft.tasks.answers import AnswerMetrics
from adapeft.tasks.causal_lm import LanguageModelTask
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.rows import REMEDY, DroppedError, InvalidRowError, RefusedError, RowFilter

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache, Progress
    from adapeft.data.description import DataDescription
    from adapeft.data.streams import Rows
    from adapeft.tasks.generation import Prompts
    from adapeft.tasks.losses.objective import Objective
    from adapeft.tasks.tokens.tokenize import TokenizedData


class Seq2SeqData(AnsweredData, StreamableData):
    """Pairs of texts to train and evaluate on."""

    task: ClassVar[str] = "seq2seq"

    source: str = Field(default="source", description="column of the text that the encoder reads")
    target: str = Field(default="target", description="column of the text that the decoder writes")
    prefix: str = Field(
        default="", description="text before every source, such as 'summarize: ' for T5, with the space after it"
    )
    max_length: PositiveInt = Field(default=128, description="maximum tokens of a source, with its prefix")
    max_target_length: PositiveInt = Field(default=128, description="maximum tokens of a target")
    padding: Padding = "longest"
    too_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="what happens to longer sources and targets"
    )
    invalid: Invalid = Field(default="error", description="what happens to pairs with a text without tokens")
    generate: Harmless[Generated] = 0
    max_new_tokens: Harmless[NewTokens] = 128
    metric: Harmless[Literal["auto", "loss", "perplexity", "exact_match", "rouge_l", "bleu"]] = Field(
        default="auto", description="evaluation metric; the last three need data.generate"
    )

    @property
    def text_columns(self) -> dict[str, str]:
        return {"source": self.source, "target": self.target}


class Seq2Seq(LanguageModelTask[Seq2SeqData]):
    """Sequence to sequence; the labels are the target's tokens, which the model itself shifts for its decoder."""

    data = Seq2SeqData
    auto_class = "AutoModelForSeq2SeqLM"
    export_type = "SEQ_2_SEQ_LM"
    drops_rows = True

    def tokenize(
        self,
        rows: Rows,
        data: Seq2SeqData,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        from adapeft.data.padding import with_padding
        from adapeft.tasks.tokens.tokenize import TokenizedData, check_fast, made

        tokenizer = with_padding(tokenizer)
        check_fast(tokenizer, "whether a text was truncated")
        num_special = tokenizer.num_special_tokens_to_add(pair=False)
        for key, most in (("max_length", data.max_length), ("max_target_length", data.max_target_length)):
            if most <= num_special:
                raise AdapeftError(
                    f"data.{key} = {most}: a text has {num_special} special tokens, so no token of it is left. Raise "
                    f"it to at least {num_special + 1}."
                )
        rules = data.model_dump(include={"max_length", "max_target_length", "prefix", "too_long", "invalid"})
        examples = made(
            lambda progress: _encoded(rows, data, tokenizer, progress),
            {"kind": "pairs", **rules},
            rows,
            [data.source, data.target],
            tokenizer,
            cache,
        )
        return TokenizedData(examples, None, tokenizer, data.fixed_length, data.max_target_length)

    def objective(self, description: DataDescription) -> Objective:
        from adapeft.tasks.losses.cross_entropy import SequenceToSequence

        return SequenceToSequence()

    def metrics(self, description: DataDescription) -> Metrics:
        return TargetMetrics()

    def prompts(self, rows: datasets.Dataset, data: Seq2SeqData, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
        from adapeft.data.padding import with_padding

        return _prompts(rows, data, with_padding(tokenizer)) if data.generate else None

    def summary(self, description: DataDescription, data: Seq2SeqData) -> str:
        return f"{description.training} training pairs, {description.num_evaluation:,} evaluation pairs"


class TargetMetrics(AnswerMetrics):
    """Metrics of targets."""

    of = "seq2seq"


def _encoded(
    rows: Rows, data: Seq2SeqData, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> Iterator[dict[str, list[Any]]]:
    """Yield batches of tokenized pairs.

    Raises:
        AdapeftError: the config's rules refuse a pair, or none is left.
    """
    for kept in _kept(rows, data, tokenizer, progress):
        if kept:
            yield {name: [pair[name] for _, pair in kept] for name in kept[0][1]}


def _kept(
    rows: Rows, data: Seq2SeqData, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Yield batches of the numbers of rows and of their tokens, without those of rows that are dropped.

    A pair that is too long follows ``data.too_long``, one with a text without tokens ``data.invalid``.

    Raises:
        AdapeftError: these rules refuse a pair, or drop all.
    """
    from adapeft.tasks.tokens.tokenize import batches_of

    start, keep = 0, RowFilter(data.invalid)
    for batch in batches_of(rows, [data.source, data.target], progress):
        texts = [data.prefix + text for text in batch[data.source]]
        sources = tokenizer(texts, truncation=True, max_length=data.max_length)
        targets = tokenizer(text_target=batch[data.target], truncation=True, max_length=data.max_target_length)
        inputs = (dict(zip(sources, values, strict=True)) for values in zip(*sources.values(), strict=True))
        cut = ([bool(one.overflowing) for one in found.encodings or ()] for found in (sources, targets))
        given = zip(range(start, start + len(texts)), inputs, targets["input_ids"], *cut, strict=True)
        yield keep.examples(given, partial(_pair, data))
        start += len(texts)
    keep.check_any("pairs")


def _pair(data: Seq2SeqData, given: tuple[int, dict[str, Any], list[int], bool, bool]) -> tuple[int, dict[str, Any]]:
    """Return the number of a row and the columns of its example.

    Args:
        data: the config's ``data`` section.
        given: number, inputs, labels, and whether the source and the target were cut.

    Raises:
        InvalidRowError: a text has no token, or is too long and ``data.too_long`` is ``error``.
        DroppedError: a text is too long and ``data.too_long`` is ``drop``.
    """
    from adapeft.tasks.tokens.tokenize import LABELS, TRUNCATED

    row, inputs, labels, *cut = given
    texts = (("source", "max_length", inputs["input_ids"]), ("target", "max_target_length", labels))
    for (name, key, tokens), is_cut in zip(texts, cut, strict=True):
        said = f"its {name} has more than data.{key} = {getattr(data, key)} tokens"
        if is_cut and data.too_long == "error":
            raise RefusedError(f"{said}. Raise that, or set data.too_long: truncate or drop")
        if is_cut and data.too_long == "drop":
            raise DroppedError(said)
        if not tokens:
            raise InvalidRowError(f"its {name} has no token. {REMEDY}")
    return row, {**inputs, LABELS: labels, TRUNCATED: any(cut)}


def _prompts(rows: datasets.Dataset, data: Seq2SeqData, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Return the sources of the first ``data.generate`` pairs that are examples, with their whole targets."""
    from adapeft.tasks.generation import Prompts
    from adapeft.tasks.tokens.tokenize import LABELS

    pairs = (pair for kept in _kept(rows, data, tokenizer, lambda done, total: None) for pair in kept)
    first = list(islice(pairs, None if data.generate == "all" else data.generate))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    # A target ends with the tokenizer's own last token, which is not the end of text of every one.
    ends = {tokenizer.eos_token_id} - {None} | {pair[LABELS][-1] for _, pair in first} & special
    answers = [tokenizer(text_target=rows[row][data.target], add_special_tokens=False)["input_ids"] for row, _ in first]
    return Prompts(
        [pair["input_ids"] for _, pair in first],
        [data.prefix + rows[row][data.source] for row, _ in first],
        [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers],
        list(range(len(first))),
        frozenset(ends),
        data.max_new_tokens,
        tokenizer,
    )

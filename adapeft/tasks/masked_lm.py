"""Masked language modeling, such as the continued pretraining of an encoder on texts of its later domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from adapeft.errors import AdapeftError
from adapeft.sections.data import StreamableData, TextData
from adapeft.sections.section import Harmless
from adapeft.tasks.causal_lm import LanguageModelTask, TokenMetrics
from adapeft.tasks.metrics.metrics import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache
    from adapeft.data.description import DataDescription
    from adapeft.data.streams import Rows
    from adapeft.tasks.losses.objective import Objective
    from adapeft.tasks.tokens.tokenize import TokenizedData


class MaskedLMData(TextData, StreamableData):
    """Texts to train and evaluate on."""

    task: ClassVar[str] = "masked-lm"

    max_length: PositiveInt = Field(
        default=128, description="tokens per block that the texts are split into, with the special tokens around it"
    )
    mask_probability: float = Field(
        default=0.15, gt=0, le=1, description="probability that a token is predicted; 80 % of these are masked"
    )
    metric: Harmless[Literal["auto", "loss", "perplexity"]] = Field(default="auto", description="evaluation metric")


class MaskedLM(LanguageModelTask[MaskedLMData]):
    """Masked language modeling; an example is a block of exactly ``data.max_length`` tokens, of which some are masked.

    The masks of the training examples are drawn anew in every epoch. Measuring and evaluating use those of the first.
    """

    data = MaskedLMData
    auto_class = "AutoModelForMaskedLM"
    export_type = None
    packs_texts = True
    refuses_decoders = True  # a decoder reads the labels

    def tokenize(
        self,
        rows: Rows,
        data: MaskedLMData,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        from adapeft.data.padding import with_padding
        from adapeft.tasks.tokens.tokenize import TokenizedData, blocks_of

        if tokenizer.mask_token_id is None:
            raise AdapeftError(
                "model.task = masked-lm: the tokenizer of model.name has no mask token. Name an encoder that was "
                "pretrained with masks, or set model.task: causal-lm."
            )
        tokenizer = with_padding(tokenizer)
        blocks = blocks_of(rows, data.text, data.max_length, tokenizer, cache, is_framed=True)
        # Added tokens are no words, and a model that was not resized for them has no embedding of theirs.
        masking = Masking(
            data.mask_probability, tokenizer.mask_token_id, tokenizer.vocab_size, tuple(tokenizer.all_special_ids)
        )
        return TokenizedData(blocks, None, tokenizer, draw=masking)

    def objective(self, description: DataDescription) -> Objective:
        from adapeft.tasks.losses.cross_entropy import MaskedTokens

        return MaskedTokens()

    def metrics(self, description: DataDescription) -> Metrics:
        return MaskedTokenMetrics()

    def summary(self, description: DataDescription, data: MaskedLMData) -> str:
        return (
            f"{description.training} training texts, {description.num_evaluation:,} evaluation texts, in blocks of "
            f"{data.max_length} tokens, {data.mask_probability:.0%} of them predicted"
        )


class MaskedTokenMetrics(TokenMetrics):
    """Metrics of the prediction of masked tokens."""

    of = "masked-lm"


@dataclass(frozen=True)
class Masking:
    """The tokens to predict and what the model reads in their place (Devlin et al. 2019, section 3.1).

    Of the tokens to predict, 80 % are replaced by the mask, 10 % by any word, and 10 % stay. At least one token of an
    example is predicted, unless all are special. The draws depend only on the example and the epoch.

    Attributes:
        probability: probability of an ordinary token to be predicted.
        mask: id of the mask token.
        num_words: number of the words that may replace a token, the ids below it.
        special: ids of special tokens, which are not predicted.
    """

    probability: float
    mask: int
    num_words: int
    special: tuple[int, ...]

    def __call__(self, columns: Mapping[str, list[Any]], ids: Sequence[int], epoch: int) -> dict[str, list[Any]]:
        """Return the columns with masked ``input_ids``, and ``labels``."""
        from adapeft.tasks.tokens.tokenize import LABELS

        drawn = [self._masked(row, example, epoch) for row, example in zip(columns["input_ids"], ids, strict=True)]
        return {**columns, "input_ids": [tokens for tokens, _ in drawn], LABELS: [labels for _, labels in drawn]}

    def _masked(self, row: list[int], example: int, epoch: int) -> tuple[list[int], list[int]]:
        """Return the tokens that the model reads and the labels."""
        import numpy as np

        from adapeft.tasks.losses.objective import IGNORED

        tokens = np.array(row)
        chance, kind, word = np.random.default_rng([_STREAM, epoch, example]).random((3, len(tokens)))
        chance[np.isin(tokens, self.special)] = 2.0
        # A block without a prediction would be measured and trained on nothing.
        is_predicted = (chance < self.probability) | ((chance == chance.min()) & (chance < 1))
        read = np.where(is_predicted & (kind < 0.8), self.mask, tokens)
        read = np.where(is_predicted & (kind >= 0.9), (word * self.num_words).astype(np.int64), read)
        return read.tolist(), np.where(is_predicted, tokens, IGNORED).tolist()


_STREAM = 0x6D61736B
"""Start of the seeds of masks, so that they share no draws with the order of the examples or sampled labels."""

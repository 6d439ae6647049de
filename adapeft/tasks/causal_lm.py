"""Causal language modeling on texts that are joined and split into blocks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveInt

from adapeft.sections.data import Data, StreamableData, TextData
from adapeft.sections.section import Harmless
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache
    from adapeft.data.description import DataDescription, Labels
    from adapeft.data.labels import Head
    from adapeft.data.streams import Rows
    from adapeft.tasks.losses.objective import Objective
    from adapeft.tasks.tokens.tokenize import TokenizedData


class CausalLMData(TextData, StreamableData):
    """Texts to train and evaluate on."""

    task: ClassVar[str] = "causal-lm"
    formerly: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"text_pair": None, "label": "label", "padding": "longest"}
    )

    max_length: PositiveInt = Field(default=128, description="tokens per block that the texts are split into")
    metric: Harmless[Literal["auto", "loss", "perplexity"]] = Field(default="auto", description="evaluation metric")


D = TypeVar("D", bound=Data)


class LanguageModelTask(Task[D]):
    """Base class of tasks whose model predicts tokens with its own outputs."""

    predicts_tokens = True

    def labels(self, splits: Mapping[str, Rows], data: D, head: Head | None) -> Labels:
        from adapeft.data.description import Labels

        return Labels()

    def metrics(self, description: DataDescription) -> Metrics:
        return TokenMetrics()


class NextTokenTask(LanguageModelTask[D]):
    """Base class of tasks whose model predicts the next token."""

    auto_class = "AutoModelForCausalLM"
    export_type = "CAUSAL_LM"

    def objective(self, description: DataDescription) -> Objective:
        from adapeft.tasks.losses.cross_entropy import NextToken

        return NextToken()


class CausalLM(NextTokenTask[CausalLMData]):
    """Causal language modeling; an example is a block of exactly ``data.max_length`` tokens, which are its labels."""

    data = CausalLMData
    packs_texts = True

    def tokenize(
        self,
        rows: Rows,
        data: CausalLMData,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        from adapeft.data.padding import with_padding
        from adapeft.tasks.tokens.tokenize import TokenizedData, blocks_of

        tokenizer = with_padding(tokenizer)
        return TokenizedData(blocks_of(rows, data.text, data.max_length, tokenizer, cache), None, tokenizer)

    def summary(self, description: DataDescription, data: CausalLMData) -> str:
        return (
            f"{description.training} training texts, {description.num_evaluation:,} evaluation texts, in blocks of "
            f"{data.max_length} tokens"
        )


class TokenMetrics(Metrics):
    """Metrics of language models, which depend only on the mean loss."""

    of = "causal-lm"
    higher_is_better = {"loss": False, "perplexity": False}
    reads_logits = False

    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        import torch

        return {"perplexity": torch.tensor(loss, dtype=torch.float64).exp().item()}

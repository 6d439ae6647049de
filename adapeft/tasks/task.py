"""The interface of tasks for measuring, training and exporting.

Tasks are imported for the config's keys, without torch: modules that need torch, ``datasets`` or torchmetrics are
imported where they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from adapeft.sections.data import Data

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache
    from adapeft.data.description import DataDescription, Labels
    from adapeft.data.labels import Head
    from adapeft.data.streams import Rows
    from adapeft.tasks.generation import Prompts
    from adapeft.tasks.losses.objective import Objective
    from adapeft.tasks.metrics.metrics import Metrics
    from adapeft.tasks.tokens.tokenize import TokenizedData

D = TypeVar("D", bound=Data)


class Task(ABC, Generic[D]):
    """Base class of tasks.

    Attributes:
        data: class of the config's ``data`` section; its ``task`` is the task's name.
        auto_class: transformers class that builds the model.
        export_type: PEFT ``TaskType`` of exported adapters; None where PEFT has no type for the task.
        has_head: whether labels determine the outputs of a head on top; otherwise the model has outputs of its own, for
            tokens, which may be tied to its embeddings, or the score of a choice.
        predicts_tokens: whether the model is a language model.
        problem_types: values of a model's ``config.problem_type`` that belong to this task, for tasks with a head.
        packs_texts: whether texts are joined and split into blocks of ``data.max_length`` tokens. The number of
            examples is then known only after tokenization, all have the same length, and none is padded.
        drops_rows: whether tokenization may drop rows, so that only it tells the number of examples, or rows do not
            tell which of them are the longest.
        refuses_decoders: whether the model must not be an encoder-decoder.
        reads_images: whether the examples are images, which the model's image processor prepares instead of a
            tokenizer.
    """

    data: ClassVar[type[Data]]
    auto_class: ClassVar[str]
    export_type: ClassVar[str | None]
    has_head: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    problem_types: ClassVar[tuple[str | None, ...]] = (None,)
    packs_texts: ClassVar[bool] = False
    drops_rows: ClassVar[bool] = False
    refuses_decoders: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name of the task in ``model.task``."""
        return self.data.task

    def columns(self, rows: Rows, split: str, data: D) -> list[str]:
        """Return the columns that the task reads of the rows of ``split``, a field of the config.

        Raises:
            AdapeftError: a column is missing or named twice.
        """
        from adapeft.data.columns import named_columns

        return named_columns(data)

    @abstractmethod
    def labels(self, splits: Mapping[str, Rows], data: D, head: Head | None) -> Labels:
        """Return a description of the labels of ``data.train`` and ``data.evaluation``, whose columns exist.

        Args:
            splits: rows by field of the config.
            data: the config's ``data`` section.
            head: trained head that the labels belong to; None for a new head.

        Raises:
            AdapeftError: a label is invalid for the task; the message names the column, the row and the label.
        """

    @abstractmethod
    def tokenize(
        self,
        rows: Rows,
        data: D,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        """Tokenize rows from ``open_rows`` that ``describe`` has checked.

        Any number of processes can do this concurrently, with the same result.

        Args:
            rows: rows with the columns that ``data`` names; a stream only if ``data`` is a ``StreamableData``.
            data: the config's ``data`` section.
            tokenizer: tokenizer, which is not changed; the result has a copy that can pad.
            description: description of the training data, which numbers the classes; None for tasks without classes.
            cache: cache of this machine, whose files the processes share; None: in memory, for a sample of the rows.

        Raises:
            AdapeftError: there are too few tokens for an example, a row has no token, or the cache cannot be written.
        """

    def prompts(self, rows: datasets.Dataset, data: D, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
        """Return the prompts of the evaluation rows whose answers are to be generated; None if none are.

        Args:
            rows: rows of ``data.evaluation``, which ``tokenize`` accepts.
            data: the config's ``data`` section.
            tokenizer: tokenizer, which is not changed.

        Raises:
            AdapeftError: a prompt cannot be told from its answer, or no prompt is left.
        """
        return None

    @abstractmethod
    def objective(self, description: DataDescription) -> Objective:
        """Return the loss, which also samples labels."""

    def objective_of(self, problem_type: str | None, labels: Tensor) -> Objective | None:
        """Return the loss that transformers computes for such labels, if the model's ``problem_type`` alone decides it.

        None for other tasks, whose losses ``infer_objective`` distinguishes by the model's class.
        """
        return None

    @abstractmethod
    def metrics(self, description: DataDescription) -> Metrics:
        """Return the metrics of the predictions."""

    @abstractmethod
    def summary(self, description: DataDescription, data: D) -> str:
        """Return a summary of the examples, for progress messages."""

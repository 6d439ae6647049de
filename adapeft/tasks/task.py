"""What a task is: everything that measuring, training and exporting ask of it.

A task is imported for the keys of the config, before torch is: what needs torch, ``datasets`` or torchmetrics is
imported where it is used.
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

    from adapeft.data.description import DataDescription, Labels
    from adapeft.data.labels import Head
    from adapeft.tasks.metrics import Metrics
    from adapeft.tasks.objective import Objective
    from adapeft.tasks.tokenize import TokenizedData

D = TypeVar("D", bound=Data)


class Task(ABC, Generic[D]):
    """What a model is trained to do.

    Attributes:
        data: the keys of the config's ``data`` section, whose ``task`` is the task's name.
        auto_class: class of transformers that builds the model.
        export_type: PEFT's ``TaskType`` of an adapter.
        has_head: whether labels decide the outputs of a head on top; else the model predicts tokens with its own
            outputs, which may be tied to its embeddings.
        problem_types: with a head, the values of a model's ``config.problem_type`` that are for this task.
        packs_texts: whether examples are blocks of ``data.max_length`` tokens that the texts are joined and cut into,
            so that their number is known once they are tokenized, all are as long, and none is padded.
    """

    data: ClassVar[type[Data]]
    auto_class: ClassVar[str]
    export_type: ClassVar[str]
    has_head: ClassVar[bool] = False
    problem_types: ClassVar[tuple[str | None, ...]] = (None,)
    packs_texts: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As ``model.task`` spells it."""
        return self.data.task

    @abstractmethod
    def labels(self, splits: Mapping[str, datasets.Dataset], data: D, head: Head | None) -> Labels:
        """What the labels of ``data.train`` and ``data.evaluation`` are; their columns are there.

        Args:
            splits: the rows by field of the config.
            data: the config's section.
            head: the trained head that the labels are for; None where it is new.

        Raises:
            AdapeftError: names the column, the row and the label that the task cannot take.
        """

    @abstractmethod
    def tokenize(
        self,
        rows: datasets.Dataset,
        data: D,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
    ) -> TokenizedData:
        """Tokenizes what ``load_rows`` gave and ``describe`` checked.

        Nothing is written to disk or shared, so any number of processes can do this at once, each with the same
        result.

        Args:
            rows: columns as ``data`` names them.
            data: the config's section.
            tokenizer: left as it is; the data keeps a copy that can pad.
            description: of the training data, which numbers the classes; None where there are none.

        Raises:
            AdapeftError: too few tokens for an example, or a row without any token.
        """

    @abstractmethod
    def objective(self, description: DataDescription) -> Objective:
        """The loss, and the labels that are sampled for it."""

    def objective_of(self, problem_type: str | None, labels: Tensor) -> Objective | None:
        """The loss that transformers computes of such labels, where the model's ``problem_type`` alone decides it.

        It is None for the other tasks, whose losses ``infer_objective`` tells apart by the model's class.
        """
        return None

    @abstractmethod
    def metrics(self, description: DataDescription) -> Metrics:
        """How predictions are judged."""

    @abstractmethod
    def summary(self, description: DataDescription, data: D) -> str:
        """The examples in words."""

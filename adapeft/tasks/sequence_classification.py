"""Sequence classification: one class or one number per text or pair of texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveInt

from adapeft.sections.data import PaddedData, Padding, TextData
from adapeft.sections.section import Harmless
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.task import Task

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache
    from adapeft.data.description import DataDescription, Labels
    from adapeft.data.labels import Head
    from adapeft.tasks.losses.objective import Objective
    from adapeft.tasks.tokens.tokenize import TokenizedData


D = TypeVar("D", bound="TextClassificationData")


class TextClassificationData(TextData, PaddedData):
    """Data options of text classifiers; each subclass adds its ``metric``."""

    text_pair: str | None = Field(default=None, description="column of the second text, for tasks on pairs")
    label: str | tuple[str, ...] = Field(default="label", description="column of the label")
    max_length: PositiveInt = Field(default=128, description="maximum tokens per example; longer ones are truncated")
    padding: Padding = "longest"

    @property
    def text_columns(self) -> dict[str, str]:
        return {"text": self.text} | ({} if self.text_pair is None else {"text_pair": self.text_pair})


class ClassificationData(TextClassificationData):
    """Examples to train and evaluate on."""

    task: ClassVar[str] = "sequence-classification"

    label: str = Field(default="label", description="column of the label")
    metric: Harmless[Literal["auto", "accuracy", "matthews", "f1", "accuracy_f1", "pearson_spearman", "loss"]] = Field(
        default="auto", description="evaluation metric; auto depends on the labels"
    )

    @property
    def label_columns(self) -> dict[str, tuple[str, ...]]:
        return {"label": (self.label,)}


class TextClassification(Task[D]):
    """Base class of classifiers of a text or a pair of texts, whose labels determine the outputs of a head."""

    auto_class = "AutoModelForSequenceClassification"
    export_type = "SEQ_CLS"
    has_head = True

    def tokenize(
        self,
        rows: datasets.Dataset,
        data: D,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        from adapeft.data.padding import with_padding
        from adapeft.tasks.tokens.tokenize import TokenizedData, examples_of, labels_of

        assert description is not None, "classes are numbered by the description of the training data"
        tokenizer = with_padding(tokenizer)
        make_labels = partial(self.label_tensor, rows, data, description)
        labels = labels_of(rows, data.label_columns["label"], description, make_labels, cache)
        examples = examples_of(rows, list(data.text_columns.values()), data.max_length, tokenizer, cache)
        return TokenizedData(examples, labels, tokenizer, data.fixed_length)

    @abstractmethod
    def label_tensor(self, rows: datasets.Dataset, data: D, description: DataDescription) -> Tensor:
        """Return the labels of N rows in the format of ``Batch``, [N, …]."""


class SequenceClassification(TextClassification[ClassificationData]):
    """Sequence classification; integers, booleans and strings are classes, floats are regression targets."""

    data = ClassificationData
    problem_types = (None, "single_label_classification", "regression")

    def labels(self, splits: Mapping[str, datasets.Dataset], data: ClassificationData, head: Head | None) -> Labels:
        from adapeft.data.single_labels import classes_or_targets

        return classes_or_targets(splits, data.label, head)

    def objective(self, description: DataDescription) -> Objective:
        from adapeft.tasks.losses.cross_entropy import Classification
        from adapeft.tasks.losses.squared_error import Regression

        return Regression() if self._is_regression(description) else Classification()

    def metrics(self, description: DataDescription) -> Metrics:
        return TargetMetrics() if self._is_regression(description) else ClassMetrics(description.num_labels)

    def summary(self, description: DataDescription, data: ClassificationData) -> str:
        kind = ", regression targets" if self._is_regression(description) else f", {description.num_labels} classes"
        return f"{description.training} training examples, {description.num_evaluation:,} evaluation examples{kind}"

    def label_tensor(self, rows: datasets.Dataset, data: ClassificationData, description: DataDescription) -> Tensor:
        """Return targets float32 [N] or classes int64 [N]."""
        import torch

        from adapeft.data.labels import class_numbers

        if self._is_regression(description):
            return torch.tensor(rows[data.label][:], dtype=torch.float32)
        return torch.tensor(class_numbers(rows, data.label, description.label_names))

    def _is_regression(self, description: DataDescription) -> bool:
        return description.problem_type == "regression"


class ClassMetrics(Metrics):
    """Metrics of classes; the data has ``num_classes``."""

    of = "classification"
    higher_is_better = {"accuracy": True, "f1": True, "accuracy_f1": True, "matthews": True, "loss": False}

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def predictions(self, logits: Tensor, labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        return logits[predicted].argmax(-1), labels[predicted]

    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        from adapeft.tasks.metrics.scores import agreement

        assert predictions is not None
        assert labels is not None
        return agreement(predictions, labels, self.num_classes)


class TargetMetrics(Metrics):
    """Metrics of regression targets."""

    of = "regression"
    higher_is_better = {"pearson_spearman": True, "pearson": True, "spearman": True, "loss": False}

    def predictions(self, logits: Tensor, labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        targets = labels[predicted]
        return logits[predicted].double().reshape(len(targets)), targets

    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        from adapeft.tasks.metrics.scores import correlations

        assert predictions is not None
        assert labels is not None
        return correlations(predictions, labels)

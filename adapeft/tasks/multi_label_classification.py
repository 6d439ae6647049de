"""Multi-label classification: any number of labels per text or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from adapeft.errors import AdapeftError
from adapeft.sections.section import Harmless
from adapeft.tasks.losses.objective import Objective
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.sequence_classification import TextClassification, TextClassificationData

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

    from adapeft.data.description import Batch, DataDescription, Labels
    from adapeft.data.labels import Head, SplitLabels

_PROBLEM_TYPE = "multi_label_classification"


class MultiLabelData(TextClassificationData):
    """Examples to train and evaluate on."""

    task: ClassVar[str] = "multi-label-classification"

    label: str | Annotated[tuple[str, ...], Field(min_length=2)] = Field(
        default="label", description="column of lists of names or numbers, or several columns of 0 and 1, one per label"
    )
    metric: Harmless[Literal["auto", "micro_f1", "accuracy", "loss"]] = Field(
        default="auto", description="evaluation metric; accuracy: fraction of examples with all labels right"
    )

    @property
    def label_columns(self) -> dict[str, tuple[str, ...]]:
        return {"label": (self.label,) if isinstance(self.label, str) else self.label}


class MultiLabelClassification(TextClassification[MultiLabelData]):
    """Multi-label classification; every output of the head is one label."""

    data = MultiLabelData
    problem_types = (_PROBLEM_TYPE,)

    def labels(self, splits: Mapping[str, datasets.Dataset], data: MultiLabelData, head: Head | None) -> Labels:
        from adapeft.data.description import Labels
        from adapeft.data.labels import check_names, number_classes
        from adapeft.data.single_labels import check_known, check_spelling

        read = _of_lists if isinstance(data.label, str) else _of_columns
        train, evaluation = (read(rows, split, data.label_columns["label"]) for split, rows in splits.items())
        column = _spelled(data.label_columns["label"])
        check_spelling(train, column)
        check_spelling(evaluation, column)
        check_known(train, evaluation, column)
        if head is None or head.names is None:
            check_names(train, column)
        names, num_outputs = number_classes(train, head, column)
        if num_outputs < 2:
            raise AdapeftError(
                f"data.label = {column!r}: data.train has only one label, {next(iter(train.counts))!r}. Give at least "
                "two, or set model.task: sequence-classification to predict whether it applies."
            )
        return Labels(names, num_outputs, _PROBLEM_TYPE)

    def label_tensor(self, rows: datasets.Dataset, data: MultiLabelData, description: DataDescription) -> Tensor:
        """Return float32 [N, C]: 1 where an example has a label, else 0."""
        import torch

        labels = torch.zeros(len(rows), description.num_labels)
        columns = data.label_columns["label"]
        if isinstance(data.label, str):
            lists = list(_values(rows, data.label))
            flat = [label for labels_of_row in lists for label in labels_of_row]
            row = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(one) for one in lists]))
            labels[row, _numbers(flat, rows.features[data.label].feature, description)] = 1.0
        else:
            numbers = _numbers(list(columns), None, description)
            labels[:, numbers] = torch.tensor([list(_values(rows, column)) for column in columns]).float().t()
        return labels

    def objective(self, description: DataDescription) -> Objective:
        return IndependentLabels()

    def objective_of(self, problem_type: str | None, labels: Tensor) -> Objective | None:
        takes = problem_type == _PROBLEM_TYPE and labels.ndim == 2 and labels.is_floating_point()
        return IndependentLabels() if takes else None

    def metrics(self, description: DataDescription) -> Metrics:
        return LabelMetrics(description.num_labels)

    def summary(self, description: DataDescription, data: MultiLabelData) -> str:
        return (
            f"{description.training} training examples, {description.num_evaluation:,} evaluation examples, "
            f"{description.num_labels} labels, any number per example"
        )


class IndependentLabels(Objective):
    """Binary cross-entropy of every label: logits [n, C], labels float [n, C] in [0, 1].

    The mean is over examples and labels, as in transformers.
    """

    summary = "binary cross-entropy of each label"

    def predicted(self, labels: Tensor) -> Tensor:
        import torch

        return torch.ones_like(labels, dtype=torch.bool)

    def outside(self, labels: Tensor, num_outputs: int) -> Tensor:
        return labels[~((labels >= 0) & (labels <= 1))]

    def outputs(self, num_outputs: int) -> str:
        return "0 and 1. Write 1 for the labels that an example has and 0 for all others; none can be left out"

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.shape == labels.shape

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return ids.new_zeros(len(ids), num_outputs).float()

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        import torch.nn.functional as F

        from adapeft.tasks.losses.draws import wide

        logits = wide(logits)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")

    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        from adapeft.tasks.losses.draws import uniforms

        # The likelihood is a product over labels, so each is drawn independently with its own probability.
        probabilities = logits.detach().double().sigmoid()
        draws = uniforms(batch.ids, batch.labels.shape[1], seed).to(logits.device)
        return (draws < probabilities).to(batch.labels.dtype)


class LabelMetrics(Metrics):
    """Metrics of ``num_labels`` labels; a label is predicted if its probability is above one half."""

    of = "multi-label-classification"
    higher_is_better = {"micro_f1": True, "accuracy": True, "loss": False}

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def predictions(self, logits: Tensor, labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        return (logits > 0).long(), labels.long()

    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        from torchmetrics.functional.classification import multilabel_exact_match, multilabel_f1_score

        assert predictions is not None
        assert labels is not None
        return {
            "micro_f1": multilabel_f1_score(predictions, labels, self.num_labels, average="micro").item(),
            "accuracy": multilabel_exact_match(predictions, labels, self.num_labels).item(),
        }


def _of_lists(rows: datasets.Dataset, split: str, columns: Sequence[str]) -> SplitLabels:
    """Count the labels in a column of lists."""
    from collections import Counter

    import datasets

    from adapeft.data.columns import check_values
    from adapeft.data.labels import SplitLabels, kind_of

    column = columns[0]
    feature = rows.features[column]
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None
    declared = tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else None
    if declared is None and kind_of(inner) not in ("integer", "string"):
        raise AdapeftError(
            f"data.label = {column!r}: this column of {split} has type {feature}. Labels must be lists of names or of "
            "integers, or several columns of 0 and 1, all listed in data.label."
        )
    check_values(
        rows,
        split,
        "data.label",
        column,
        _is_no_list,
        "not a list of distinct labels, each a name or an integer from 0. Correct or drop such rows",
    )
    counts = Counter(label for labels in _values(rows, column) for label in labels)
    if not counts:
        raise AdapeftError(f"data.label = {column!r}: no row of {split} has a label. Give another column.")
    if declared is not None:
        if (most := max(counts)) >= len(declared):
            raise AdapeftError(
                f"data.label = {column!r}: {split} has label number {most}, but names for only {len(declared)} labels. "
                "Correct the names or the numbers."
            )
        return SplitLabels(split, "string", declared, {declared[number]: count for number, count in counts.items()})
    return SplitLabels(split, str(kind_of(inner)), None, counts)


def _of_columns(rows: datasets.Dataset, split: str, columns: Sequence[str]) -> SplitLabels:
    """Count the labels that are columns of 0 and 1, in their order."""
    from adapeft.data.columns import check_values
    from adapeft.data.labels import SplitLabels

    for column in columns:
        check_values(rows, split, "data.label", column, _is_no_bit, "neither 0 nor 1. Correct or drop such rows")
    counts = {column: sum(map(int, _values(rows, column))) for column in columns}
    return SplitLabels(split, "string", tuple(columns), counts)


def _numbers(labels: Sequence[Any], feature: Any, description: DataDescription) -> list[int]:
    """Return the output index of every label; ``feature`` is their type in ``datasets``."""
    import datasets

    from adapeft.data.labels import class_numbers

    features = None if feature is None else datasets.Features({"label": feature})
    return class_numbers(
        datasets.Dataset.from_dict({"label": labels}, features=features), "label", description.label_names
    )


def _values(rows: datasets.Dataset, column: str) -> Any:
    from adapeft.data.labels import values_of

    return values_of(rows, column)


def _spelled(columns: Sequence[str]) -> str:
    return ", ".join(columns)


def _is_no_list(value: Any) -> bool:
    if not isinstance(value, list) or len(set(value)) < len(value):
        return True
    return any(label is None or (not label.strip() if isinstance(label, str) else label < 0) for label in value)


def _is_no_bit(value: Any) -> bool:
    return value not in (0, 1)

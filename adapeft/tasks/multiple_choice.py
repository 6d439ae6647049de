"""Multiple choice: a question and some answers, of which one is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from adapeft.errors import AdapeftError
from adapeft.sections.data import PaddedData, Padding
from adapeft.sections.section import Harmless
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.task import Task

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache, Progress
    from adapeft.data.description import DataDescription, Labels
    from adapeft.data.labels import Head
    from adapeft.tasks.losses.objective import Objective
    from adapeft.tasks.tokens.tokenize import TokenizedData

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MultipleChoiceData(PaddedData):
    """Questions to train and evaluate on."""

    task: ClassVar[str] = "multiple-choice"

    question: str = Field(default="question", description="column of the question, or of the start of a text")
    choices: str | Annotated[tuple[str, ...], Field(min_length=2)] = Field(
        default="choices", description="column of lists of texts, or several columns of texts, one per choice"
    )
    label: str = Field(default="label", description="column of the right choice, a number from 0 or a letter from A")
    max_length: PositiveInt = Field(
        default=128, description="maximum tokens of a question with a choice; longer ones are truncated"
    )
    padding: Padding = "longest"
    metric: Harmless[Literal["auto", "accuracy", "loss"]] = Field(default="auto", description="evaluation metric")

    @property
    def text_columns(self) -> dict[str, str]:
        several = () if isinstance(self.choices, str) else self.choices
        return {"question": self.question} | {f"choices.{number}": name for number, name in enumerate(several)}

    @property
    def label_columns(self) -> dict[str, tuple[str, ...]]:
        label: dict[str, tuple[str, ...]] = {"label": (self.label,)}
        return {"choices": (self.choices,), **label} if isinstance(self.choices, str) else label

    @property
    def all_columns(self) -> list[str]:
        """Columns of the question and the choices."""
        return [self.question, *((self.choices,) if isinstance(self.choices, str) else self.choices)]


class MultipleChoice(Task[MultipleChoiceData]):
    """Multiple choice; the model gives one score for the question with each choice, and their softmax is predicted."""

    data = MultipleChoiceData
    auto_class = "AutoModelForMultipleChoice"
    export_type = None
    drops_rows = True

    def labels(self, splits: Mapping[str, datasets.Dataset], data: MultipleChoiceData, head: Head | None) -> Labels:
        from adapeft.data.description import Labels

        counts = {split: _num_choices(rows, split, data) for split, rows in splits.items()}
        train, evaluation = counts.values()
        if train != evaluation:
            raise AdapeftError(
                f"data.choices: the rows of data.train have {train} choices, those of data.evaluation {evaluation}. "
                "Give all the same number."
            )
        for split, rows in splits.items():
            _check_labels(rows, split, data, train)
        return Labels(num_outputs=train)

    def tokenize(
        self,
        rows: datasets.Dataset,
        data: MultipleChoiceData,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        import torch

        from adapeft.data.labels import values_of
        from adapeft.data.padding import with_padding
        from adapeft.tasks.tokens.tokenize import TokenizedData, check_fast, labels_of, made

        assert description is not None, "the number of choices is that of the training data"
        tokenizer = with_padding(tokenizer)
        check_fast(tokenizer, "whether a text was truncated")
        num_special = tokenizer.num_special_tokens_to_add(pair=True)
        if data.max_length < num_special + 2:
            raise AdapeftError(
                f"data.max_length = {data.max_length}: a question with a choice has {num_special} special tokens, so "
                f"no token of both is left. Raise it to at least {num_special + 2}."
            )
        examples = made(
            lambda progress: _encoded(rows, data, tokenizer, progress),
            {"kind": "choices", "max_length": data.max_length},
            rows,
            data.all_columns,
            tokenizer,
            cache,
        )
        labels = labels_of(
            rows,
            [data.label],
            description,
            lambda: torch.tensor([_number(value) for value in values_of(rows, data.label)]),
            cache,
        )
        return TokenizedData(examples, labels, tokenizer, data.fixed_length, num_choices=description.num_labels)

    def objective(self, description: DataDescription) -> Objective:
        from adapeft.tasks.losses.cross_entropy import Choices

        return Choices(description.num_labels)

    def metrics(self, description: DataDescription) -> Metrics:
        return ChoiceMetrics()

    def summary(self, description: DataDescription, data: MultipleChoiceData) -> str:
        return (
            f"{description.training} training questions, {description.num_evaluation:,} evaluation questions, "
            f"{description.num_labels} choices each"
        )


class ChoiceMetrics(Metrics):
    """Metrics of choices."""

    of = "multiple-choice"
    higher_is_better = {"accuracy": True, "loss": False}

    def predictions(self, logits: Tensor, labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        return logits.argmax(-1), labels

    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        assert predictions is not None
        assert labels is not None
        return {"accuracy": (predictions == labels).double().mean().item()}


def _num_choices(rows: datasets.Dataset, split: str, data: MultipleChoiceData) -> int:
    """Return the number of choices of every row.

    Raises:
        AdapeftError: a row has no list of at least two texts, or another number of them than the first row.
    """
    from adapeft.data.columns import check_values
    from adapeft.data.labels import values_of

    if not isinstance(data.choices, str):
        return len(data.choices)
    remedy = "Correct or drop such rows"
    complaint = f"not a list of at least two texts. {remedy}"
    check_values(rows, split, "data.choices", data.choices, _are_no_choices, complaint)
    first = len(next(values_of(rows, data.choices)))
    complaint = f"not {first} choices as in row 0. {remedy}"
    check_values(rows, split, "data.choices", data.choices, lambda choices: len(choices) != first, complaint)
    return first


def _check_labels(rows: datasets.Dataset, split: str, data: MultipleChoiceData, num_choices: int) -> None:
    from adapeft.data.columns import check_values

    complaint = (
        f"not one of its {num_choices} choices: a number from 0 to {num_choices - 1}, or a letter from A to "
        f"{_LETTERS[:num_choices][-1]}. Correct or drop such rows"
    )
    check_values(rows, split, "data.label", data.label, lambda value: not 0 <= _number(value) < num_choices, complaint)


def _are_no_choices(value: Any) -> bool:
    return not isinstance(value, list) or len(value) < 2 or not all(isinstance(choice, str) for choice in value)


def _number(value: Any) -> int:
    """Return the number of a choice that is given by its number or letter; -1 if it is neither."""
    if isinstance(value, str):
        return _LETTERS.find(value) if len(value) == 1 else -1
    return value if type(value) is int else -1


def _encoded(
    rows: datasets.Dataset, data: MultipleChoiceData, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> Iterator[dict[str, list[Any]]]:
    """Yield columns with one list per choice: the tokens of the question with it."""
    from adapeft.tasks.tokens.tokenize import TRUNCATED, batches_of

    for batch in batches_of(rows, data.all_columns, progress):
        questions, *columns = batch.values()
        lists: Sequence[Sequence[str]] = (
            columns[0] if isinstance(data.choices, str) else list(zip(*columns, strict=True))
        )
        size = len(lists[0])
        tokens = tokenizer(
            [question for question in questions for _ in range(size)],
            [choice for choices in lists for choice in choices],
            truncation=True,
            max_length=data.max_length,
        )
        is_cut = [bool(encoding.overflowing) for encoding in tokens.encodings or ()]
        starts = range(0, len(is_cut), size)
        nested = {name: [values[start : start + size] for start in starts] for name, values in tokens.items()}
        yield {**nested, TRUNCATED: [any(is_cut[start : start + size]) for start in starts]}

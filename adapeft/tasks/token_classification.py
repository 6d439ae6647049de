"""Token classification: a class for every word of a text, such as the kind of entity that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from adapeft.errors import AdapeftError
from adapeft.sections.data import Invalid, PaddedData, Padding
from adapeft.sections.section import Harmless
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.rows import REMEDY, InvalidRowError, RowFilter
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


class TokenClassificationData(PaddedData):
    """Words to classify."""

    task: ClassVar[str] = "token-classification"

    words: str = Field(default="tokens", description="column of the words, a list of texts in each row")
    label: str = Field(default="ner_tags", description="column of the tags, as many as words")
    max_length: PositiveInt = Field(
        default=128, description="maximum tokens per example; the words of longer ones that do not fit are left out"
    )
    padding: Padding = "longest"
    invalid: Invalid = Field(
        default="error",
        description="what happens to rows without words or with other than one known tag for each, or of which no word "
        "has a token",
    )
    metric: Harmless[Literal["auto", "entity_f1", "entity_precision", "entity_recall", "accuracy", "loss"]] = Field(
        default="auto", description="evaluation metric; auto: entity_f1 where the tags are those of entities"
    )

    @property
    def label_columns(self) -> dict[str, tuple[str, ...]]:
        return {"words": (self.words,), "label": (self.label,)}


class TokenClassification(Task[TokenClassificationData]):
    """Token classification; the first token of a word has the word's label, all others have none."""

    data = TokenClassificationData
    auto_class = "AutoModelForTokenClassification"
    export_type = "TOKEN_CLS"
    has_head = True
    drops_rows = True

    def labels(
        self, splits: Mapping[str, datasets.Dataset], data: TokenClassificationData, head: Head | None
    ) -> Labels:
        from adapeft.data.description import Labels
        from adapeft.data.single_labels import classes_or_targets

        known: set[Any] | None = None
        flat = {}
        for split, rows in splits.items():
            tags = _valid_tags(rows, split, data, known)
            flat[split] = _flat(rows, data.label, tags)
            known = set(map(_name_of(rows, data.label), chain.from_iterable(tags))) if known is None else known
        found = classes_or_targets(flat, data.label, head)
        if found.problem_type == "regression":
            raise AdapeftError(f"data.label = {data.label!r}: its tags are floats. Give names or integers.")
        return Labels(found.names, found.num_outputs)

    def tokenize(
        self,
        rows: datasets.Dataset,
        data: TokenClassificationData,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        from adapeft.data.padding import with_padding
        from adapeft.tasks.tokens.tokenize import TokenizedData, check_fast, made

        assert description is not None, "classes are numbered by the description of the training data"
        tokenizer = with_padding(tokenizer)
        check_fast(tokenizer, "to which word a token belongs")
        key = {
            "kind": "words",
            "max_length": data.max_length,
            "invalid": data.invalid,
            "names": description.label_names,
            "outputs": description.num_labels,
        }
        examples = made(
            lambda progress: _encoded(rows, data, description, tokenizer, progress),
            key,
            rows,
            [data.words, data.label],
            tokenizer,
            cache,
        )
        return TokenizedData(examples, None, tokenizer, data.fixed_length)

    def objective(self, description: DataDescription) -> Objective:
        from adapeft.tasks.losses.cross_entropy import TokenClasses

        return TokenClasses()

    def metrics(self, description: DataDescription) -> Metrics:
        return TagMetrics(description.label_names, description.num_labels)

    def summary(self, description: DataDescription, data: TokenClassificationData) -> str:
        return (
            f"{description.training} training examples, {description.num_evaluation:,} evaluation examples, "
            f"{description.num_labels} tags"
        )


class TagMetrics(Metrics):
    """Metrics of tags; those of entities exist if all are O or named by a scheme of entities.

    The schemes are B-X, I-X (IOB), also with E-X or L-X for the last word and S-X or U-X for a single one (IOE, IOBES,
    BILOU), and with M-X for an inner one (BMES). An entity counts if its type, its first and its last word are
    predicted. Computed by seqeval in its default mode, that of conlleval, which also reads predictions that are invalid
    in the scheme.
    """

    of = "token-classification"

    def __init__(self, names: Sequence[str] | None, num_classes: int) -> None:
        self.names, self.num_classes = names, num_classes

    @property
    def has_entities(self) -> bool:
        """Whether the tags are those of entities."""
        return self.names is not None and all(
            name == "O" or (name[:1] in _PREFIXES and name[1:2] == "-") for name in self.names
        )

    @property
    def higher_is_better(self) -> Mapping[str, bool]:  # type: ignore[override]
        """See ``Metrics``; which metrics exist depends on the tags."""
        return ({name: True for name in _OF_ENTITIES} if self.has_entities else {}) | {"accuracy": True, "loss": False}

    def predictions(self, logits: Tensor, labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tags of all words [W + n], with -100 after each example."""
        import torch.nn.functional as F

        from adapeft.tasks.losses.objective import IGNORED

        found = logits.argmax(-1).masked_fill(~predicted, IGNORED)
        ends = F.pad(predicted, (0, 1), value=True)
        return F.pad(found, (0, 1), value=IGNORED)[ends], F.pad(labels, (0, 1), value=IGNORED)[ends]

    def scores(self, loss: float, predictions: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        from adapeft.tasks.losses.objective import IGNORED

        assert predictions is not None
        assert labels is not None
        counted = labels != IGNORED
        accuracy = (predictions[counted] == labels[counted]).double().mean().item()
        if not self.has_entities:
            return {"accuracy": accuracy}
        from seqeval.metrics import f1_score, precision_score, recall_score

        expected, found = self._tags(labels), self._tags(predictions)
        computed = {"entity_f1": f1_score, "entity_precision": precision_score, "entity_recall": recall_score}
        # Without a predicted entity the precision is 0 by convention; seqeval would warn of every such evaluation.
        scored = {name: float(score(expected, found, zero_division=0)) for name, score in computed.items()}
        return {**scored, "accuracy": accuracy}

    def _tags(self, numbers: Tensor) -> list[list[str]]:
        """Return the names of tags by example."""
        assert self.names is not None
        examples: list[list[str]] = [[]]
        for number in numbers.tolist():
            if number < 0:
                examples.append([])
            else:
                name = self.names[number]
                examples[-1].append(name if name == "O" else _PREFIXES[name[0]] + name[1:])
        return examples[:-1]


_OF_ENTITIES = ("entity_f1", "entity_precision", "entity_recall")
_PREFIXES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}
"""Prefix of a tag → that of IOBES, which the default mode of seqeval reads; it takes others for names of types."""


def _valid_tags(
    rows: datasets.Dataset, split: str, data: TokenClassificationData, known: Collection[Any] | None
) -> list[list[Any]]:
    """Return the tags of the rows that are examples.

    Args:
        rows: rows of ``split``.
        split: field of the config, for messages.
        data: the config's ``data`` section.
        known: names or numbers of the tags of the training data; None: any.

    Raises:
        AdapeftError: ``data.invalid`` is ``error`` and a row has other than words with a known tag for each, or no row
            has these. Names the row.
    """
    from adapeft.data.labels import values_of

    name_of = _name_of(rows, data.label)

    def tags_of(given: tuple[Any, Any]) -> list[Any]:
        tags = _tags_of(given, data)
        unknown = [tag for tag in tags if known is not None and name_of(tag) not in known]
        if unknown:
            raise InvalidRowError(
                f"data.label = {data.label!r} has the tag {name_of(unknown[0])!r}, which no row of data.train has. "
                f"{REMEDY}"
            )
        return tags

    keep = RowFilter(data.invalid)
    try:
        tags = keep.examples(zip(values_of(rows, data.words), values_of(rows, data.label), strict=True), tags_of)
        keep.check_any("rows")
    except AdapeftError as error:
        raise AdapeftError(f"{split}: {error}") from error
    return tags


def _tags_of(given: tuple[Any, Any], data: TokenClassificationData) -> list[Any]:
    """Return the tags of a row, given by its words and tags.

    Raises:
        InvalidRowError: it has other than words with a tag for each.
    """
    words, tags = given
    if _is_no_words(words):
        raise InvalidRowError(f"data.words = {data.words!r} has {words!r:.80}, not a list of words. {REMEDY}")
    if _is_no_tags(tags):
        raise InvalidRowError(
            f"data.label = {data.label!r} has {tags!r:.80}, not a list of names or of numbers. {REMEDY}"
        )
    if len(words) != len(tags):
        raise InvalidRowError(f"data.label = {data.label!r} has {len(tags)} tags for {len(words)} words. {REMEDY}")
    return list(tags)


def _is_no_words(value: Any) -> bool:
    return not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value)


def _is_no_tags(value: Any) -> bool:
    if not isinstance(value, list):
        return True
    return any(tag is None or (not tag.strip() if isinstance(tag, str) else tag < 0) for tag in value)


def _tag_feature(rows: datasets.Dataset, column: str) -> Any:
    """Return the type of the tags in a column of lists; None for one whose rows have other types, too."""
    return getattr(rows.features[column], "feature", None)


def _name_of(rows: datasets.Dataset, column: str) -> Callable[[Any], Any]:
    """Return the function of a tag that gives its name, if its number stands for one."""
    names = getattr(_tag_feature(rows, column), "names", None)
    return (lambda tag: tag) if names is None else (lambda tag: names[tag] if tag < len(names) else tag)


def _flat(rows: datasets.Dataset, column: str, values: Iterable[Sequence[Any]]) -> datasets.Dataset:
    """Return the tags in ``values`` as one column, of the type that the column of lists has in ``rows``."""
    import datasets

    feature = _tag_feature(rows, column)
    tags = {column: list(chain.from_iterable(values))}
    return datasets.Dataset.from_dict(tags, None if feature is None else datasets.Features({column: feature}))


def _encoded(
    rows: datasets.Dataset,
    data: TokenClassificationData,
    description: DataDescription,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> Iterator[dict[str, list[Any]]]:
    """Yield tokenized examples.

    Raises:
        AdapeftError: ``data.invalid`` is ``error`` and a row is no example, or none is.
    """
    from adapeft.data.labels import numbering
    from adapeft.tasks.losses.objective import IGNORED
    from adapeft.tasks.tokens.tokenize import LABELS, TRUNCATED, batches_of

    number_of = numbering(_tag_feature(rows, data.label), description.label_names)

    def known(tag: Any) -> int:
        try:
            number = number_of(tag)
        except LookupError:
            number = -1
        if not 0 <= number < description.num_labels:
            raise InvalidRowError(f"data.label = {data.label!r} has the unknown tag {tag!r}. {REMEDY}")
        return number

    def example(given: tuple[Any, Any]) -> dict[str, Any]:
        own = [known(tag) for tag in _tags_of(given, data)]
        tokens = tokenizer(given[0], is_split_into_words=True, truncation=True, max_length=data.max_length)
        labels, last = [], -1
        for word in tokens.word_ids():
            labels.append(IGNORED if word is None or word == last else own[word])
            last = last if word is None else word
        if last < 0:
            raise InvalidRowError(
                f"no word of it has one of the first data.max_length = {data.max_length} tokens. {REMEDY}"
            )
        return {**tokens, LABELS: labels, TRUNCATED: last < len(own) - 1}

    keep = RowFilter(data.invalid)
    for batch in batches_of(rows, [data.words, data.label], progress):
        kept = keep.examples(zip(batch[data.words], batch[data.label], strict=True), example)
        if kept:
            yield {name: [one[name] for one in kept] for name in kept[0]}
    keep.check_any("rows")

"""Image classification: one class per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from adapeft.errors import AdapeftError
from adapeft.sections.data import Data, Invalid
from adapeft.sections.section import Harmless
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.rows import REMEDY, InvalidRowError, RowFilter
from adapeft.tasks.sequence_classification import ClassMetrics
from adapeft.tasks.task import Task

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from adapeft.data.cache import Cache, Progress
    from adapeft.data.description import DataDescription, Labels
    from adapeft.data.labels import Head
    from adapeft.tasks.losses.objective import Objective
    from adapeft.tasks.tokens.tokenize import TokenizedData


class ImageData(Data):
    """Images to train and evaluate on."""

    task: ClassVar[str] = "image-classification"

    image: str = Field(
        default="image",
        description="column of the images: files, with paths from the folder of the data, or their bytes",
    )
    label: str = Field(default="label", description="column of the class")
    invalid: Invalid = Field(default="error", description="what happens to rows without a valid image")
    metric: Harmless[Literal["auto", "accuracy", "matthews", "f1", "accuracy_f1", "loss"]] = Field(
        default="auto", description="evaluation metric"
    )

    @property
    def image_columns(self) -> dict[str, str]:
        return {"image": self.image}

    @property
    def label_columns(self) -> dict[str, tuple[str, ...]]:
        return {"label": (self.label,)}


class ImageClassification(Task[ImageData]):
    """Image classification; the model's own image processor makes the pixels, batch by batch."""

    data = ImageData
    auto_class = "AutoModelForImageClassification"
    export_type = None
    has_head = True
    problem_types = (None, "single_label_classification")
    drops_rows = True
    reads_images = True

    def labels(self, splits: Mapping[str, datasets.Dataset], data: ImageData, head: Head | None) -> Labels:
        import datasets

        from adapeft.data.single_labels import classes_or_targets

        for split, rows in splits.items():
            feature = rows.features[data.image]
            if not isinstance(feature, datasets.Image):
                raise AdapeftError(
                    f"data.image = {data.image!r}: this column of {split} has type {feature}. Give paths of files, "
                    "their bytes, or a column of images of datasets."
                )
        found = classes_or_targets(splits, data.label, head)
        if found.problem_type == "regression":
            raise AdapeftError(f"data.label = {data.label!r}: its classes are floats. Give names or integers.")
        return found

    def tokenize(
        self,
        rows: datasets.Dataset,
        data: ImageData,
        tokenizer: PreTrainedTokenizerBase,
        description: DataDescription | None = None,
        cache: Cache | None = None,
    ) -> TokenizedData:
        import torch

        from adapeft.data.labels import class_numbers
        from adapeft.tasks.images import Images
        from adapeft.tasks.tokens.tokenize import made

        assert description is not None, "classes are numbered by the description of the training data"
        key = {"kind": "images", "invalid": data.invalid}
        valid = made(lambda progress: _valid(rows, data, progress), key, rows, [data.image], None, cache)
        kept = rows.select(valid["row"][:])
        labels = torch.tensor(class_numbers(kept, data.label, description.label_names))
        return Images(valid, labels, tokenizer, images=rows.select_columns(data.image))

    def objective(self, description: DataDescription) -> Objective:
        from adapeft.tasks.losses.cross_entropy import ImageClasses

        return ImageClasses()

    def metrics(self, description: DataDescription) -> Metrics:
        return ClassMetrics(description.num_labels)

    def summary(self, description: DataDescription, data: ImageData) -> str:
        return (
            f"{description.training} training images, {description.num_evaluation:,} evaluation images, "
            f"{description.num_labels} classes"
        )


def _valid(rows: datasets.Dataset, data: ImageData, progress: Progress) -> Iterator[dict[str, list[int]]]:
    """Yield the numbers of the rows whose image can be read, in a column ``row``.

    Raises:
        AdapeftError: one cannot be read and ``data.invalid`` is ``error``, or none can.
    """
    from adapeft.tasks.images import problem_of

    def number(given: tuple[int, Any]) -> int:
        row, image = given
        if (problem := problem_of(image)) is not None:
            raise InvalidRowError(f"data.image = {data.image!r} is not an image: {problem}. {REMEDY}")
        return row

    keep = RowFilter(data.invalid)
    for start in range(0, len(rows), _BATCH):
        images: Sequence[Any] = (
            rows.select_columns(data.image).with_format("arrow")[start : start + _BATCH][data.image].to_pylist()
        )
        kept = keep.examples(enumerate(images, start), number)
        progress(start + len(images), len(rows))
        if kept:
            yield {"row": kept}
    keep.check_any("rows")


_BATCH = 256

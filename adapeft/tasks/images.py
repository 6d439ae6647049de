"""Images as examples: which are valid, and batches of their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from adapeft.data.description import Batch
from adapeft.tasks.tokens.tokenize import TokenizedData

# What Pillow raises for files that are damaged, missing or no images.
_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Images(TokenizedData):
    """The images of a split; ``rows`` holds the numbers of those that are valid in a column ``row``.

    ``tokenizer`` is the model's image processor.

    Attributes:
        images: all images of the split, its only column; a batch reads its own.
    """

    images: datasets.Dataset = None  # the fields before it have defaults

    @property
    def lengths(self) -> list[int]:
        """1 for each image: the processor gives all the same size."""
        return [1] * len(self)

    def collate(self, indices: Sequence[int] | np.ndarray, epoch: int = 0) -> Batch:
        """Return the pixels of the images at ``indices``."""
        ids = torch.tensor([int(index) for index in indices])
        assert self.labels is not None
        processor: Any = self.tokenizer
        mean = getattr(processor, "image_mean", None)
        mode = "L" if mean is not None and len(mean) == 1 else "RGB"
        (opened,) = self.images[self.rows[ids.tolist()]["row"]].values()
        inputs = processor(images=[image.convert(mode) for image in opened], return_tensors="pt")
        return Batch({"pixel_values": inputs["pixel_values"]}, self.labels[ids], ids)


def problem_of(image: Mapping[str, Any] | None) -> str | None:
    """Return why an encoded image of ``datasets`` cannot be read, as a sentence without its end; None if it can."""
    if image is None:
        return "it is missing"
    try:
        datasets.Image().decode_example(dict(image)).load()
    except _ERRORS as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return None

"""Errors of the model on a batch of invalid examples, reported with the numbers of the examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapeft.errors import AdapeftError

if TYPE_CHECKING:
    from adapeft.data.description import Batch

_SHOWN = 8

_OF_INPUT = re.compile(
    r"index .*out of (range|bounds)|device-side assert|out of bounds|must match|broadcast|shapes cannot be multiplied"
    r"|invalid for input of size|size mismatch|mismatch in (size|shape)",
    re.IGNORECASE,
)
"""Messages of torch on indices and shapes. Lost connections and exhausted memory are RuntimeErrors too."""


@contextmanager
def naming_examples(batch: Batch) -> Iterator[None]:
    """Name the batch's examples if the model or the loss fails on indices or shapes within the context.

    Raises:
        AdapeftError: an index or a shape is invalid. Other errors pass unchanged, because the input does not cause
            them.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, IndexError) and not _OF_INPUT.search(reason):
            raise
        # Only shapes: after a device-side assertion no value on the GPU can be read.
        ids = ", ".join(map(str, batch.ids[:_SHOWN].tolist())) + (", …" if len(batch.ids) > _SHOWN else "")
        tensors = {name: value for name, value in batch.inputs.items() if hasattr(value, "shape")}
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
        raise AdapeftError(
            f"the model cannot take a batch of examples {ids} (counted from 0; {shapes}, labels "
            f"{list(batch.labels.shape)}): {type(error).__name__}: {reason}. Check these examples and data.max_length, "
            "and that the tokenizer and the number of classes belong to the model."
        ) from error

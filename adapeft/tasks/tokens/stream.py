"""Training examples that are tokenized while they are read, in the order of a seeded buffer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from adapeft.tasks.tokens.tokenize import MADE, NUMBER, READ, TRUNCATED, TokenizedData


@dataclass
class Counts:
    """What was read of a stream and what came of it, up to a batch.

    Attributes:
        passes: passes over the data that were begun.
        rows: rows read, over all passes, with those whose examples are in the buffer.
        made: examples that they gave; a row that is dropped gives none.
        examples: examples in the batches.
        truncated: those of them of which tokens were cut off.
    """

    passes: int = 0
    rows: int = 0
    made: int = 0
    examples: int = 0
    truncated: int = 0


@dataclass(frozen=True)
class StreamedBatch:
    """A global batch in memory, the pass over the data that it belongs to, and the counts up to it."""

    examples: TokenizedData
    epoch: int
    counts: Counts


@dataclass(frozen=True)
class ExampleStream:
    """The examples of a stream, whose passes follow each other without end.

    Every rank reads the whole stream and takes its share of each batch, so that neither the number of ranks nor that of
    micro-batches changes a batch. ``datasets`` shuffles: its buffer holds ``buffer`` examples. Examples have the
    numbers, and blocks of texts the borders, that they would have without streaming.

    Attributes:
        data: tokenized examples, whose rows are a ``datasets.IterableDataset``.
        buffer: number of examples in memory; 1: in the order of the data.
        seed: random seed of the run.
    """

    data: TokenizedData
    buffer: int
    seed: int

    def first(self, count: int) -> TokenizedData:
        """Return the first examples that are trained on, at most ``count``, in memory."""
        return self._held(next(self._pass(0, count)))

    def batches(self, size: int, done: int = 0) -> Iterator[StreamedBatch]:
        """Yield the global batches of all passes after the first ``done``; the last one of a pass may be short.

        A buffer cannot be restored without its examples, so the batches that are done are read again, as by the
        Trainer of transformers when it resumes.
        """
        counts, place = Counts(), 0
        for epoch in itertools.count():
            before = replace(counts)
            for columns in self._pass(epoch, size):
                counts.passes = epoch + 1
                counts.rows = max(counts.rows, before.rows + max(columns[READ]))
                counts.made = max(counts.made, before.made + max(columns[MADE]))
                counts.examples += len(columns[NUMBER])
                counts.truncated += sum(columns.get(TRUNCATED, ()))
                place += 1
                if place > done:
                    yield StreamedBatch(self._held(columns), epoch, replace(counts))

    def _pass(self, epoch: int, size: int) -> Iterator[dict[str, list[Any]]]:
        # The seeds of ``epoch_batches``: a buffer for all examples gives the order that they have without streaming.
        generator = np.random.default_rng([self.seed, 1, epoch])
        return iter(self.data.rows.shuffle(generator=generator, buffer_size=self.buffer).iter(size))

    def _held(self, columns: dict[str, list[Any]]) -> TokenizedData:
        own = {name: values for name, values in columns.items() if name not in (NUMBER, READ, MADE)}
        return replace(self.data, rows=datasets.Dataset.from_dict(own), numbers=np.array(columns[NUMBER]))

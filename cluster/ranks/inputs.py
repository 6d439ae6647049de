"""Inputs of every rank: model, data and objective. The config alone determines them, so all ranks load the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from adapeft.config.config import Config
from adapeft.config.keys import flatten
from adapeft.data.batches import epoch_batches
from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.streams import open_rows
from adapeft.model.load import describe_for, load_model, load_model_config, load_tokenizer
from adapeft.model.unloaded.divided import Division, load_divided
from adapeft.sections.data import StreamableData
from adapeft.tasks.generation import Prompts
from adapeft.tasks.losses.micro_batches import Collate
from adapeft.tasks.losses.objective import Objective
from adapeft.tasks.losses.own_loss import check_own_loss, check_packing, check_padding
from adapeft.tasks.metrics.metrics import Metrics
from adapeft.tasks.registry import TASKS
from adapeft.tasks.tokens.packing import packed_batch
from adapeft.tasks.tokens.stream import Counts, ExampleStream
from adapeft.tasks.tokens.tokenize import LABELS, TokenizedData
from cluster.cache import cache_of
from cluster.events import Report, ignore
from cluster.output.folder import RunFolder


@dataclass(frozen=True)
class StepBatch:
    """The global batch of a training step: indices of its examples, what collates them, and counts of a stream."""

    indices: np.ndarray
    collate: Collate
    counts: Counts | None = None


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run.

    Attributes:
        config: config of the run.
        description: description of the data.
        train: training examples; with ``data.streaming`` the first of them, which are measured on.
        evaluation: evaluation examples.
        objective: loss of the task.
        metrics: metrics of the task.
        prompts: prompts whose answers an evaluation generates; None if it generates none.
        stream: all training examples of a streamed data set; None without ``data.streaming``.
    """

    config: Config
    description: DataDescription
    train: TokenizedData
    evaluation: TokenizedData
    objective: Objective
    metrics: Metrics
    prompts: Prompts | None
    stream: ExampleStream | None = None

    @property
    def num_examples(self) -> int | None:
        """Number of training examples; None for a stream."""
        return len(self.train) if self.stream is None else None

    def model(self, division: Division | None = None) -> PreTrainedModel:
        """Load a new copy of the base model, and set the matmul precision of this process.

        Args:
            division: division of its weights over the ranks, for which loading is collective; None: whole.
        """
        torch.set_float32_matmul_precision(self.config.model.matmul_precision)
        model, always_train = self.config.model, self.config.select.always_train
        config = load_model_config(model, self.description, self.train.tokenizer, always_train)
        if division is None:
            return load_model(model, config, self.config.seed, always_train)
        return load_divided(model, config, self.config.seed, always_train, division)

    def claimed_contents(self) -> dict[str, str]:
        """Return the hashes of all inputs recorded when the run folder was claimed; empty if it was not claimed.

        Raises:
            AdapeftError: this process has read different data, perhaps a copy on another machine.
        """
        folder = RunFolder.of(self.config)
        claimed = folder.contents()
        if claimed:
            folder.check_contents(self.description.content, flatten(self.config))
        return claimed

    def micro_batch_size(self, world_size: int) -> int:
        """Return the largest number of examples of a rank's forward pass in training."""
        train = self.config.train
        return train.micro_batch_size or math.ceil(train.batch_size / world_size)

    def steps(self, done: int, report: Report) -> Iterator[StepBatch]:
        """Yield the global batches of all epochs after the first ``done``, without end.

        Args:
            done: number of batches that are left out.
            report: callback for a note when a stream begins anew.
        """
        if self.stream is None:
            every = (
                StepBatch(batch, partial(self.train.collate, epoch=epoch))
                for epoch in itertools.count()
                for batch in self.training_batches(epoch)
            )
            yield from itertools.islice(every, done, None)
            return
        if done:
            report({"step": f"reading data.train again up to step {done:,}"})
        before = None
        for batch in self.stream.batches(self.config.train.batch_size, done):
            if before is not None and before.passes < batch.counts.passes:
                exhausted = f"data.train is exhausted after {before.rows:,} rows"
                report({"step": f"{exhausted}; pass {batch.counts.passes} over it begins", "is_note": True})
            before = batch.counts
            collate = partial(batch.examples.collate, epoch=batch.epoch)
            yield StepBatch(np.arange(len(batch.examples)), collate, batch.counts)

    def training_batches(self, epoch: int) -> tuple[np.ndarray, ...]:
        """Return the global batches of an epoch of ``train``, counted from 0."""
        settings = self.config.train
        lengths = self.train.lengths if settings.train_sampling_strategy == "group_by_length" else None
        return epoch_batches(len(self.train), settings.batch_size, self.config.seed, epoch, lengths)


def check_loss(model: nn.Module, inputs: Inputs, world_size: int, report: Report = ignore) -> None:
    """Compare the objective's loss with the model's own, and examples alone with the same examples in a batch.

    Collective under ZeRO: every rank runs the same micro-batch, so all ranks reach the same result.

    Args:
        model: model or engine around it, in evaluation mode.
        inputs: inputs of the run.
        world_size: number of ranks that share a training batch.
        report: callback for a note on what makes the loss need more memory than usual.

    Raises:
        AdapeftError: the losses differ, or padding or packing changes the predictions of the model.
    """
    collate, objective, size = inputs.train.collate, inputs.objective, inputs.micro_batch_size(world_size)
    micros = (collate(batch[:size]) for batch in inputs.training_batches(epoch=0))
    first = next(micro for micro in micros if objective.num_predictions(micro.labels))
    device = next(model.parameters()).device
    check_own_loss(objective, first.to(device), model)
    if (remark := objective.remark(model, first)) is not None:
        report({"step": remark, "is_note": True})
    order = np.argsort(inputs.train.lengths, kind="stable")
    if inputs.train.packed_length is not None:
        _check_packing(model, inputs, order[:3], device)
        return
    alone, batched = (collate(indices).to(device) for indices in (order[:1], order[[0, -1]]))
    check_padding(objective, alone, batched, model)


def _check_packing(model: nn.Module, inputs: Inputs, examples: np.ndarray, device: torch.device) -> None:
    """Compare some examples alone with the same examples in rows of two, the last of which may be padded."""
    train = inputs.train
    columns, padded = train.rows[examples.tolist()], replace(train, packed_length=None)
    alone = [padded.collate([example]).to(device) for example in examples]
    rows = [list(range(start, min(start + 2, len(alone)))) for start in range(0, len(alone), 2)]
    ids = torch.from_numpy(examples)
    packed = packed_batch(columns["input_ids"], columns[LABELS], ids, rows, train.tokenizer.pad_token_id)
    check_packing(inputs.objective, alone, packed.to(device), model)


def count_examples(config: Config, description: DataDescription) -> int | None:
    """Return the number of training examples: rows, or what the task makes of them; None for a stream."""
    task = TASKS[config.model.task]
    if config.data.is_streamed:
        return None
    return len(load_inputs(config).train) if task.packs_texts or task.drops_rows else description.num_train


def load_inputs(config: Config, head: Head | None = None, report: Report = ignore) -> Inputs:
    """Read and tokenize both splits, or map them to memory if a process of this machine has done so.

    Args:
        config: config of the run.
        head: head of a delta, which then determines the numbers of the classes; None for the model's own.
        report: callback for progress events.
    """
    description = describe_for(config.model, config.data, head)
    tokenizer = load_tokenizer(config.model)
    task = TASKS[config.model.task]
    train, evaluation = (
        task.tokenize(open_rows(config.data, field), config.data, tokenizer, description, cache_of(field, report))
        for field in ("data.train", "data.evaluation")
    )
    prompts = task.prompts(open_rows(config.data, "data.evaluation"), config.data, tokenizer)
    objective, metrics = task.objective(description), task.metrics(description)
    stream = None
    if isinstance(config.data, StreamableData) and config.data.streaming:
        stream = ExampleStream(train, config.data.shuffle_buffer, config.seed)
        report({"step": "filling data.shuffle_buffer"})
        train = stream.first(config.select.calibration)
    return Inputs(config, description, train, evaluation, objective, metrics, prompts, stream)

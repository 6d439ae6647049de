"""Inspection of a config before anything is measured: data, structure, budget. Needs no weights and no workers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from adapeft.config.config import Config
from adapeft.data.batches import draw_calibration
from adapeft.data.description import DataDescription
from adapeft.data.sources import rows_of
from adapeft.data.streams import open_rows
from adapeft.errors import AdapeftError, did_you_mean
from adapeft.measure.groups import groups_of
from adapeft.measure.measure import check_precision
from adapeft.model.checkpoint.files import has_weights, weight_files
from adapeft.model.load import build_structure, describe_for, load_model_config, load_tokenizer
from adapeft.model.quantization import stored_quantization
from adapeft.model.trial import Trial, check_images
from adapeft.model.unloaded.weightless import Weightless
from adapeft.sections.cluster import Cluster
from adapeft.sections.train import Train
from adapeft.selection.choose import check_budget, check_limit
from adapeft.subset.subset import Subset
from adapeft.tasks.registry import TASKS
from adapeft.tasks.tokens.stream import ExampleStream
from adapeft.tasks.tokens.tokenize import LABELS, TokenizedData
from cluster.cache import cache_of
from cluster.events import Report, ignore
from cluster.inspection.auto import for_model
from cluster.inspection.estimate import limit_of
from cluster.inspection.inspection import Inspection
from cluster.inspection.plan import plan_training
from cluster.zero.settings import can_divide

_LONG_TEXTS = 64
_Splits = Mapping[str, TokenizedData]
"""Tokenized examples by field of the config, the first of a stream; empty for tasks whose examples are their rows."""


def inspect(config: Config, report: Report = ignore) -> Inspection:
    """Check data, model structure, patterns and budget, so that errors appear now instead of later.

    Args:
        config: config to check.
        report: callback for the progress of tokenization.

    Raises:
        AdapeftError: any of them is invalid.
    """
    _check_model_folder(config.model.name)
    check_precision(config.select, getattr(torch, config.model.dtype))
    description = describe_for(config.model, config.data)
    task = TASKS[config.model.task]
    task.metrics(description).primary(config.data.metric)
    plan_training(config.train, description.num_train).learning_rates()
    tokenizer = load_tokenizer(config.model)
    splits = _splits(config, tokenizer, description, report) if task.drops_rows or config.data.is_streamed else {}
    _check_calibration(config, description, tokenizer, splits)
    model_config = load_model_config(config.model, description, tokenizer, config.select.always_train)
    _check_divides(config.cluster, stored_quantization(model_config))
    _check_shards(config.model.name, model_config)
    weightless = Weightless()
    with weightless:
        structure = build_structure(model_config, config.model.task, trust_remote_code=config.model.trust_remote_code)
    sample = _sample(config, description, tokenizer, splits)
    if task.reads_images:
        check_images(structure, weightless, sample)
    else:
        trial = Trial(structure, weightless, sample)
        trial.check(config.data.max_length, lambda: _largest_token(config, tokenizer, description, splits, report))
        _check_answers(config, tokenizer, trial)
    config, auto = for_model(config, structure)
    select = config.select
    groups = groups_of(structure, select)
    new = groups.new
    if config.train.subset is not None:
        subset = Subset.load(config.train.subset)
        subset.check_fits(structure)
        new = subset.new
    _check_has_head(config.train, new)
    longest = max(config.data.max_length, sample.target_length or 0) if config.data.is_streamed else max(sample.lengths)
    num_tokens = sample.fixed_length or longest
    limit = limit_of(config, model_config, groups, num_tokens, task.objective(description))
    counts = {name: parameter.numel() for name, parameter in structure.named_parameters()}
    return Inspection(
        config,
        type(structure).__name__,
        description,
        groups,
        check_budget(groups, select) if limit is None else check_limit(groups, select, limit),
        sum(counts[name] for name in groups.always_train),
        model_config,
        num_tokens,
        limit,
        _notes(config, description, splits),
        auto,
    )


def _check_has_head(train: Train, new: Sequence[str]) -> None:
    if isinstance(train.head_learning_rate, float) and not new:
        raise AdapeftError(
            f"train.head_learning_rate = {train.head_learning_rate:g}: the base model has all parameters of this task, "
            "so there is no new head. Leave it out."
        )


def _sample(
    config: Config, description: DataDescription, tokenizer: PreTrainedTokenizerBase, splits: _Splits
) -> TokenizedData:
    """Return tokenized training examples, the first of a stream.

    Otherwise they include the longest, judged by characters if not tokenized before.
    """
    data, task = config.data, TASKS[config.model.task]
    if data.is_streamed:
        return splits["data.train"]
    if task.packs_texts:  # all have the same length
        return _blocks(config, "data.train", tokenizer, at_least=1)
    if splits:
        train = splits["data.train"]
        longest = np.argsort(train.lengths)[-_LONG_TEXTS:]
        return replace(train, rows=train.rows.select(longest))
    rows = rows_of(data, "data.train")
    texts = (rows.with_format("arrow")[column][:] for column in data.text_columns.values())
    characters = sum(pc.utf8_length(column).to_numpy() for column in texts)
    longest = np.argsort(characters)[-_LONG_TEXTS:]
    return task.tokenize(rows.select(longest), data, tokenizer, description)


def _splits(
    config: Config, tokenizer: PreTrainedTokenizerBase, description: DataDescription, report: Report
) -> _Splits:
    """Return both splits, from the cache that the workers of this machine use as well; of a stream the first examples.

    These are as many as the workers need, and more.
    """
    task, splits = TASKS[config.model.task], {}
    for field in ("data.train", "data.evaluation"):
        rows = open_rows(config.data, field)
        try:
            split = task.tokenize(rows, config.data, tokenizer, description, cache_of(field, report))
        except AdapeftError as error:
            raise AdapeftError(f"{field}: {error}") from error
        is_stream = config.data.is_streamed and field == "data.train"
        most = max(_LONG_TEXTS, config.cluster.workers)
        splits[field] = ExampleStream(split, buffer=1, seed=config.seed).first(most) if is_stream else split
    return splits


def _check_answers(config: Config, tokenizer: PreTrainedTokenizerBase, trial: Trial) -> None:
    """Check that prompts can be told from their answers, and that both fit into the model."""
    prompts = TASKS[config.model.task].prompts(open_rows(config.data, "data.evaluation"), config.data, tokenizer)
    if prompts is not None:
        trial.check_answers(max(map(len, prompts.ids)), prompts.max_new_tokens)


def _notes(config: Config, description: DataDescription, splits: _Splits) -> tuple[str, ...]:
    """Return what tokenization changed in each split."""
    if TASKS[config.model.task].packs_texts:
        return ()
    rows = {"data.train": description.num_train, "data.evaluation": description.num_evaluation}

    def truncated(split: TokenizedData) -> str:
        if TASKS[config.model.task].reads_images:
            return ""
        return f", {split.num_truncated:,} truncated to {config.data.max_length:,} tokens"

    return tuple(
        f"{field}: {count - len(split):,} of {count:,} examples dropped{truncated(split)}"
        for field, split in splits.items()
        if (count := rows[field]) is not None and (len(split) < count or split.num_truncated)
    )


def _largest_token(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    description: DataDescription,
    splits: _Splits,
    report: Report,
) -> tuple[str, int]:
    """Return the split that has the largest token id of all examples, and that id; of a stream, of all tokens."""
    if config.data.is_streamed:
        return "data.train (a stream, which may hold any token)", max(tokenizer.get_vocab().values())
    largest, splits = [], splits or _splits(config, tokenizer, description, report)
    for field, split in splits.items():
        for column in ("input_ids", LABELS) if split.is_pair else ("input_ids",):
            chunks = split.rows.data.column(column).iterchunks()
            largest.append((max(pc.max(pc.list_flatten(chunk, recursive=True)).as_py() for chunk in chunks), field))
    token, field = max(largest)
    return field, token


def _check_model_folder(name: str) -> None:
    """Check a name that can only be a folder: looking it up on the hub would take long without a network."""
    if name.startswith(("/", "./", "../", "~")) and not os.path.exists(os.path.expanduser(name)):
        parent = os.path.dirname(os.path.expanduser(name))
        # Not Path, which raises if a name is too long.
        beside = [entry.name for entry in os.scandir(parent) if entry.is_dir()] if os.path.isdir(parent) else []
        hint = did_you_mean(Path(name).name, beside)
        raise AdapeftError(f"model.name = {name}: no such folder.{hint} Give a folder or the name of a hub model.")


def _check_divides(cluster: Cluster, quantization: str) -> None:
    """Check that ZeRO-3 divides and offloads the weights.

    A 4-bit layer of bitsandbytes keeps the gathered codes until its backward pass.

    Raises:
        AdapeftError: it does not.
    """
    if quantization and cluster.offload != "none":
        raise AdapeftError(
            f"cluster.offload = {cluster.offload}: the base is quantized ({quantization}), and its codes stay on the "
            "device until the backward pass, so this saves nothing. Set cluster.offload: none."
        )
    if not can_divide(quantization, cluster.zero_stage, cluster.workers):
        raise AdapeftError(
            "cluster.zero_stage = 3: the base is quantized to int8, of which bitsandbytes keeps a copy of all weights "
            "on every worker, so they cannot be divided. Set cluster.zero_stage: 2, or model.quantization: nf4."
        )


def _check_shards(name: str, model_config: PretrainedConfig) -> None:
    """Check that a folder with weights has all of their files; one with only a config can be inspected too."""
    folder = Path(name)
    if folder.is_dir() and has_weights(folder):
        weight_files(folder, name, getattr(model_config, "transformers_weights", None))


def _check_calibration(
    config: Config, description: DataDescription, tokenizer: PreTrainedTokenizerBase, splits: _Splits
) -> None:
    """Check that there are enough examples for all ranks.

    Blocks exist only after tokenizing: this tokenizes only as many texts as it takes to find enough of them.
    """
    workers = config.cluster.workers
    if splits:
        num_examples = len(splits["data.train"])
    elif not TASKS[config.model.task].packs_texts:
        assert description.num_train is not None, "not a stream"
        num_examples = description.num_train
    else:
        num_examples = len(_blocks(config, "data.train", tokenizer, at_least=max(2, workers)))
        _blocks(config, "data.evaluation", tokenizer, at_least=1)
    draw_calibration(num_examples, config.select.calibration, config.select.batch_size, workers, config.seed)


def _blocks(config: Config, field: str, tokenizer: PreTrainedTokenizerBase, at_least: int) -> TokenizedData:
    """Return blocks of a growing part of the texts, until there are ``at_least`` blocks or no more texts."""
    rows, task = rows_of(config.data, field), TASKS[config.model.task]
    size = 64
    while True:
        try:
            blocks = task.tokenize(rows.select(range(min(size, len(rows)))), config.data, tokenizer)
            if len(blocks) >= at_least or size >= len(rows):
                return blocks
        except AdapeftError as error:  # not one block yet
            if size >= len(rows):
                raise AdapeftError(f"{field}: {error}") from error
        size *= 4

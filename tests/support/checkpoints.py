"""Tiny pretrained checkpoints and data on disk, and a function that runs the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

COMMAND = Path(sys.executable).with_name("adapeft")
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
COLOURS = {"red": ["rose", "blood", "ruby"], "green": ["leaf", "moss", "lime"], "blue": ["sky", "sea", "ink"]}
TELLING = [word for words in COLOURS.values() for word in words]
FILLING = ["a", "the", "is", "was", "of", "on", "and", "it", "new", "old", "big", "low"]
WORDS = TELLING + FILLING


def write_bert(folder: Path, max_shard_size: str = "1GB", **options: Any) -> Path:
    """Write a base model without a head, and its tokenizer."""
    torch.manual_seed(0)
    return save_model(BertModel(_bert_config(**options)), folder, max_shard_size=max_shard_size)


def write_classifier(folder: Path, num_labels: int) -> Path:
    """Write a model with a trained head whose labels are the names of the first ``num_labels`` colours."""
    torch.manual_seed(0)
    names = dict(enumerate(sorted(COLOURS)[:num_labels]))
    return save_model(BertForSequenceClassification(_bert_config(id2label=names)), folder)


def write_gpt2(folder: Path) -> Path:
    """Write a causal language model with 32 positions."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary()), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3
    )
    return save_model(GPT2LMHeadModel(config), folder)


def write_colours(folder: Path, num_train: int = 160, num_evaluation: int = 41) -> tuple[Path, Path]:
    """Write JSON lines of sentences, each labeled with the colour of one of its words."""
    rng = random.Random(0)

    def example() -> dict[str, str]:
        label = rng.choice(list(COLOURS))
        words = [*rng.choices(FILLING, k=rng.randint(3, 8)), rng.choice(COLOURS[label])]
        rng.shuffle(words)
        return {"text": " ".join(words), "label": label}

    return (
        write_lines(folder / "train.jsonl", [example() for _ in range(num_train)]),
        write_lines(folder / "validation.jsonl", [example() for _ in range(num_evaluation)]),
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_text(path: Path, num_words: int) -> Path:
    """Write plain text in lines of ten words."""
    rng = random.Random(1)
    words = rng.choices(WORDS, k=num_words)
    path.write_text("".join(" ".join(words[start : start + 10]) + "\n" for start in range(0, num_words, 10)))
    return path


def write_config(
    path: Path, model: Path, train: Path, evaluation: Path, task: str = "sequence-classification", **training: object
) -> Path:
    """Write a config with two workers and ZeRO-3, whose output is the folder ``run`` next to it.

    ``training`` adds to its ``train`` section.
    """
    content = {
        "model": {"name": str(model), "task": task},
        "data": {"train": str(train), "evaluation": str(evaluation), "max_length": 16},
        "output": str(path.parent / "run"),
        "select": {"budget": "20%", "calibration": 160, "batch_size": 16},
        "train": {"epochs": 6, "learning_rate": 5e-2, "batch_size": 16, **training},
        "cluster": {"workers": 2, "zero_stage": 3},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def adapeft(*arguments: object, timeout: float = 1500, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process."""
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _bert_config(**options: Any) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertConfig(vocab_size=len(vocabulary()), max_position_embeddings=32, **{**sizes, **options})


def vocabulary() -> dict[str, int]:
    return {word: index for index, word in enumerate([*SPECIAL, *WORDS])}


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Larger weights: at transformers' initial 0.02 a tiny model's output hardly depends on them.
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer of all words of the data."""
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(vocabulary(), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )

"""Run under torchrun: every task measured and trained at every ZeRO stage, one after another in the same processes.

``torchrun --nproc-per-node 2 -m tests.on_ranks.tasks OUT TASK=CONFIG …`` writes the output of each run into
``OUT/TASK-STAGE``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.on_ranks import finetune
from tests.support import chats
from tests.support.checkpoints import (
    COLOURS,
    FILLING,
    TELLING,
    WITHOUT_DROPOUT,
    save_model,
    vocabulary,
    write_bert,
    write_config,
    write_lines,
)
from tests.support.pictures import write_pictures, write_vit
from tests.support.ranks import leave

STAGES = (0, 1, 2, 3)
OVERRIDES = ("select.calibration=16", "select.batch_size=8", "select.warmup_steps=4", "groups=row", "budget=20%")
TRAINING = ("train.max_steps=3", "train.batch_size=8", "learning_rate=2e-2", "metric=loss")
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def write_configs(folder: Path) -> dict[str, Path]:
    """Write a tiny model without dropout, whose masks differ between divisions of a batch, and data for every task."""
    draw, configs = random.Random(0), dict[str, Path]()
    encoder = write_bert(folder / "encoder", **WITHOUT_DROPOUT)
    for task, (model, row) in _tasks(folder, encoder, draw).items():
        train, evaluation = (
            write_lines(folder / f"{task}-{split}.jsonl", [row() for _ in range(count)])
            for split, count in (("train", 64), ("evaluation", 23))
        )
        configs[task] = write_config(folder / f"{task}.yaml", model, train, evaluation, task)
    pictures = [write_lines(folder / f"{split}.jsonl", write_pictures(folder / split, 40, seed))
                for seed, split in enumerate(("seen", "unseen"))]  # fmt: skip
    path = write_config(folder / "images.yaml", write_vit(folder / "vit"), *pictures, "image-classification")
    path.write_text(path.read_text().replace("max_length: 16", "label: labels"))
    return {**configs, "image-classification": path}


def _tasks(folder: Path, encoder: Path, draw: random.Random) -> dict[str, tuple[Path, Callable[[], dict[str, Any]]]]:
    """Return the model and a function that draws a row, by task. Rows differ in length."""

    def filling(most: int = 6) -> list[str]:
        return draw.choices(FILLING, k=draw.randint(1, most))

    def coloured() -> tuple[str, str]:
        label = draw.choice(list(COLOURS))
        return label, " ".join([*filling(), draw.choice(COLOURS[label])])

    def tagged() -> dict[str, Any]:
        before, after = filling(4), filling(4)
        words = draw.choices(TELLING, k=draw.randint(1, 2))
        tags = ["B-COL", "I-COL"][: len(words)]
        return {"tokens": [*before, *words, *after], "ner_tags": [*["O"] * len(before), *tags, *["O"] * len(after)]}

    def chosen() -> dict[str, Any]:
        label, others = draw.randrange(3), COLOURS["green"] + COLOURS["blue"]
        choices = [draw.choice(COLOURS["red"] if number == label else others) for number in range(3)]
        return {"question": " ".join(filling()), "choices": choices, "label": label}

    def paired() -> dict[str, Any]:
        word = draw.choice(TELLING)
        return {"source": " ".join([*filling(), word]), "target": " ".join([word] * draw.randint(1, 3))}

    def asked() -> dict[str, Any]:
        _, text = coloured()
        turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": text[: draw.randint(3, 9)]})
        return {"messages": list(turns)}

    def text() -> dict[str, Any]:
        return {"text": " ".join([*filling(), *draw.choices(TELLING, k=9)])}

    return {
        "sequence-classification": (encoder, lambda: dict(zip(("label", "text"), coloured(), strict=True))),
        "multi-label-classification": (
            encoder,
            lambda: {"text": coloured()[1], "label": [name for name in COLOURS if draw.random() < 0.5]},
        ),
        "token-classification": (encoder, tagged),
        "multiple-choice": (encoder, chosen),
        "causal-lm": (_write_gpt2(folder / "gpt2"), text),
        "masked-lm": (_write_masked(folder / "masked"), text),
        "seq2seq": (_write_t5(folder / "t5"), paired),
        "instruct": (_write_llama(folder / "llama"), asked),
    }


def _write_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3}
    return save_model(GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary()), **shape, **quiet)), folder)


def _write_masked(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary()) + 1, max_position_embeddings=32, **_SIZES, **WITHOUT_DROPOUT)
    save_model(BertForMaskedLM(config), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    return folder


def _write_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    ids = {"vocab_size": len(vocabulary()), "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    return save_model(T5ForConditionalGeneration(T5Config(**sizes, **ids)), folder)


def _write_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = chats.make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **_SIZES)
    save_model(LlamaForCausalLM(config), folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(out: str, *configs: str) -> None:
    for task, path in (config.split("=", 1) for config in configs):
        longer = ("data.max_length=64",) if task == "instruct" else ()
        for stage in STAGES:
            where = (f"zero_stage={stage}", f"output={out}/{task}-{stage}")
            finetune.main(0, path, *OVERRIDES, *TRAINING, *longer, *where)
            dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()

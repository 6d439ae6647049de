"""Run under torchrun: transformers' Trainer with DeepSpeed trains a subset through the library.

``torchrun --nproc-per-node 2 -m tests.cluster.rank_trainer OUT`` writes a folder per ZeRO stage and dtype.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import adapeft
from adapeft import AdapeftError
from tests.cluster.ranks import leave
from tests.oracles_lora import mixed_subset
from tests.tiny import make_batches, make_bert

NUM_STEPS = 4
LEARNING_RATE = 2e-2
RUNS = [(2, False), (3, False), (3, True)]
"""ZeRO stage, and whether in bfloat16."""


def examples(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Single examples in an order that two ranks take in turns."""
    batches = make_batches(model)[:NUM_STEPS]
    return [{name: value[row] for name, value in batch.items()} for batch in batches for row in range(4)]


def arguments(folder: Path, world_size: int, **options: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=4 // world_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def deepspeed_config(stage: int, *, bf16: bool) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**31,
    }


def main(out: Path) -> None:
    for stage, bf16 in RUNS:
        folder = out / f"{stage}-{'bf16' if bf16 else 'fp32'}"
        model = adapeft.attach(make_bert().eval(), mixed_subset(make_bert()))
        options = arguments(folder, 2, save_strategy="no", bf16=bf16, deepspeed=deepspeed_config(stage, bf16=bf16))
        trainer = Trainer(model, options, train_dataset=examples(model))
        trainer.train()
        rank = torch.distributed.get_rank()
        adapeft.delta(model).save(folder / f"delta-{rank}.safetensors")
        adapeft.delta(trainer.model_wrapped).save(folder / f"wrapped-{rank}.safetensors")
        refused = []
        for call in (lambda m: adapeft.attach(m, mixed_subset(make_bert())),):
            try:
                call(trainer.model_wrapped)
            except AdapeftError as error:
                refused.append(str(error))
        torch.save(refused, folder / f"refused-{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    leave()

"""Run under torchrun: transformers' Trainer with DeepSpeed trains a subset through the library.

``torchrun --nproc-per-node 2 -m tests.on_ranks.trainer OUT`` writes one folder per ZeRO stage and dtype.
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
from tests.oracles.parts import mixed_subset
from tests.support.ranks import leave
from tests.support.tiny import make_batches, make_bert

NUM_STEPS = 4
BATCH_SIZE = 4
RUNS = {"zero2": (2, False), "zero3": (3, False), "zero3-bf16": (3, True)}
"""ZeRO stage, and whether the model is in bfloat16."""


def attached() -> nn.Module:
    """Return a model without dropout, which is random per rank, and without adapters, which have no checkpoint."""
    model = make_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return adapeft.attach(model, mixed_subset(model, adapters=False))


def trainer_of(model: nn.Module, folder: Path, world_size: int, **options: object) -> Trainer:
    """Return a Trainer that distributes the examples in order over the ranks."""
    batches = make_batches(model)[:NUM_STEPS]
    examples = [{name: value[row] for name, value in batch.items()} for batch in batches for row in range(BATCH_SIZE)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=NUM_STEPS,
        save_steps=2,
        per_device_train_batch_size=BATCH_SIZE // world_size,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        # Otherwise the Trainer multiplies the loss by the number of ranks, but BERT's is the mean of a rank's examples.
        average_tokens_across_devices=False,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=examples)


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
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**31,
    }


def main(out: Path) -> None:
    for run, (stage, bf16) in RUNS.items():
        model, options = attached(), {"bf16": bf16, "deepspeed": deepspeed_config(stage, bf16=bf16)}
        trainer = trainer_of(model, out / run, 2, **options)
        trainer.train()
        trainer.save_model(str(out / run / "final"))
        rank = torch.distributed.get_rank()
        adapeft.delta(model).save(out / run / f"delta-{rank}.safetensors")
        adapeft.delta(trainer.model_wrapped).save(out / run / f"wrapped-{rank}.safetensors")
        refused = []
        for call in (
            lambda wrapped: adapeft.attach(wrapped, mixed_subset(make_bert())),
            adapeft.detach,
            lambda wrapped: wrapped.module.save_pretrained(out / "refused"),
        ):
            try:
                call(trainer.model_wrapped)
                refused.append("")
            except AdapeftError as error:
                refused.append(str(error))
        torch.save(refused, out / run / f"refused-{rank}.pt")
        resumed = attached()
        trainer_of(resumed, out / run, 2, **options).train(resume_from_checkpoint=str(out / run / "checkpoint-2"))
        adapeft.delta(resumed).save(out / run / f"resumed-{rank}.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    leave()

"""The Trainer of transformers on the tiny models' examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.support.tiny import make_batches


def examples(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return single examples, as in a data set."""
    return [
        {name: value[row] for name, value in batch.items()}
        for batch in make_batches(model)
        for row in range(len(batch["labels"]))
    ]


def saving_trainer(model: nn.Module, folder: Path, steps: int, **options: Any) -> Trainer:
    """Return a Trainer with a constant learning rate that saves a checkpoint into ``folder`` every two steps.

    Args:
        options: more arguments of ``TrainingArguments``.
    """
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "save_steps": 2,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    data = examples(model)
    return Trainer(model, TrainingArguments(**{**arguments, **options}), train_dataset=data, eval_dataset=data[:4])

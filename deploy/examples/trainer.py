"""Text classification with the Trainer of transformers on an attached model; interrupted, it resumes when run again.

python deploy/examples/trainer.py MODEL train.jsonl validation.jsonl delta.safetensors

MODEL: folder or hub name of any text model; the files: lines with `text` and `label`. Needs `pip install accelerate`.
Checkpoints hold only what is trained, and next to it the subset.
"""

import sys
from pathlib import Path

from datasets import ClassLabel, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import adapeft


def main(name: str, train: str, validation: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files={"train": train, "validation": validation})
    names = sorted(set(data["train"]["label"]))
    data = data.cast_column("label", ClassLabel(names=names))
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    data = data.remove_columns("text").rename_column("label", "labels")
    collate = DataCollatorWithPadding(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(names), dtype="float32")

    folder = f"{out}.trainer"
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is None:
        some = data["train"].shuffle(seed=0).select(range(min(512, len(data["train"]))))
        subset = adapeft.select(model, DataLoader(some, batch_size=16, collate_fn=collate), budget="0.5%")
    else:
        subset = adapeft.Subset.load(f"{last}/subset.safetensors")
    adapeft.attach(model, subset)

    options = TrainingArguments(
        output_dir=folder,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to=[],
    )
    trainer = Trainer(
        model,
        args=options,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=last)
    print("losses", before, trainer.evaluate()["eval_loss"])
    adapeft.delta(model).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Text classification with the Trainer of transformers on an attached model.

python deploy/examples/trainer.py --model MODEL --train_file train.jsonl --validation_file validation.jsonl \
    --output_dir runs/example --num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 1e-2 \
    --eval_strategy epoch --save_strategy epoch --load_best_model_at_end

MODEL: folder or hub name of any text model; the files: lines with `text` and `label`. Needs `pip install accelerate`.
All arguments of TrainingArguments are flags. Tested are --gradient_checkpointing (with --gradient_checkpointing_kwargs
'{"use_reentrant": true}' or false), --gradient_accumulation_steps 4 and --torch_compile, which leave the losses as they
are, and --bf16, --label_smoothing_factor 0.1, --optim adafactor and --neftune_noise_alpha 5.
Checkpoints hold only what is trained, and next to it the subset; interrupted, the same command resumes from the newest
one. The delta is in delta.safetensors in the output folder.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import adapeft


@dataclass
class Arguments:
    model: str = field(metadata={"help": "folder or hub name of the model"})
    train_file: str = field(metadata={"help": "JSON lines with text and label"})
    validation_file: str = field(metadata={"help": "JSON lines with text and label"})
    max_length: int = field(default=128, metadata={"help": "maximum tokens of a text"})
    budget: str = field(default="0.5%", metadata={"help": "share of the parameters to train"})
    groups: str = field(default="row", metadata={"help": "what is chosen together: element, row, tensor or role"})


def main() -> None:
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    data = load_dataset("json", data_files=files)
    names = sorted(set(data["train"]["label"]))
    data = data.cast_column("label", ClassLabel(names=names))
    data = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=arguments.max_length), batched=True
    )
    data = data.remove_columns("text").rename_column("label", "labels")
    collate = DataCollatorWithPadding(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(names), dtype="float32")

    checkpoint = training.resume_from_checkpoint
    if checkpoint is None and Path(training.output_dir).is_dir():
        checkpoint = get_last_checkpoint(training.output_dir)
    if checkpoint is None:
        some = data["train"].shuffle(seed=0).select(range(min(512, len(data["train"]))))
        loader = DataLoader(some, batch_size=16, collate_fn=collate)
        subset = adapeft.select(model, loader, budget=arguments.budget, groups=arguments.groups)
    else:
        subset = adapeft.Subset.load(f"{checkpoint}/subset.safetensors")
    adapeft.attach(model, subset)

    trainer = Trainer(
        model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    print("losses", before, trainer.evaluate()["eval_loss"])
    adapeft.delta(model).save(f"{training.output_dir}/delta.safetensors")


if __name__ == "__main__":
    main()

"""Supervised fine-tuning with TRL on an attached model, with the loss on the completions only.

python deploy/examples/sft.py MODEL pairs.jsonl delta.safetensors

MODEL: folder or hub name of a causal language model; pairs.jsonl: lines with `prompt` and `completion`. Needs
`pip install 'adapeft[trl]'`.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import adapeft


def main(name: str, pairs: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=pairs, split="train")

    # One example per batch needs no padding; labels are masked on the prompt, as in training.
    batches = []
    for row in data.select(range(min(64, len(data)))):
        prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        tokens = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        labels = tokens.clone()
        labels[:, : prompt.shape[1]] = -100
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    adapeft.attach(model, adapeft.select(model, batches, budget="1%"))

    options = SFTConfig(
        output_dir=f"{out}.trainer",
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        completion_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    trainer = SFTTrainer(model, args=options, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    print("losses", *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    asked = tokenizer(data[0]["prompt"], return_tensors="pt").to(model.device)
    model.eval()
    said = model.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    print("generated", tokenizer.decode(said, skip_special_tokens=True))
    adapeft.delta(model).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

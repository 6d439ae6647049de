"""DPO with TRL on an attached model; the reference is the policy at the start, without a second copy of the model.

python deploy/examples/dpo.py MODEL pairs.jsonl delta.safetensors

MODEL: folder or hub name of a causal language model; pairs.jsonl: lines with `prompt`, `chosen` and `rejected`. Needs
`pip install 'adapeft[trl]'`.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import adapeft


def main(name: str, pairs: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=pairs, split="train")

    # Chosen by the likelihood of the preferred answers.
    texts = [row["prompt"] + row["chosen"] for row in data.select(range(min(64, len(data))))]
    batches = []
    for start in range(0, len(texts), 4):
        batch = tokenizer(texts[start : start + 4], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append({**batch, "labels": labels})
    adapeft.attach(model, adapeft.select(model, batches, budget="1%"))

    # The log probabilities of the starting policy are computed once, before the first step.
    options = DPOConfig(
        output_dir=f"{out}.trainer",
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        precompute_ref_log_probs=True,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    trainer = DPOTrainer(model, args=options, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses", *losses)
    adapeft.delta(model).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

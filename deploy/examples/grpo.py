"""GRPO with TRL on a few elements of an attached model, with a reward that can be verified: the answer is right.

python deploy/examples/grpo.py MODEL questions.jsonl delta.safetensors

MODEL: folder or hub name of a causal language model; questions.jsonl: lines with `prompt` and `answer`. Needs
`pip install 'adapeft[trl]'`.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import adapeft


def is_right(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Return 1 for every completion that contains the answer to its prompt, else 0."""
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]


def main(name: str, questions: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=questions, split="train")

    # Chosen by the likelihood of the right answers: rewards of an untrained policy are too rare to measure.
    batches = []
    for row in data.select(range(min(64, len(data)))):
        prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        tokens = tokenizer(row["prompt"] + row["answer"], return_tensors="pt")["input_ids"]
        labels = tokens.clone()
        labels[:, : prompt.shape[1]] = -100
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    adapeft.attach(model, adapeft.select(model, batches, budget=1000, groups="element"))

    options = GRPOConfig(
        output_dir=f"{out}.trainer",
        max_steps=30,
        per_device_train_batch_size=32,
        num_generations=16,
        max_completion_length=16,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    trainer = GRPOTrainer(model, is_right, args=options, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    print("rewards", *(entry["reward"] for entry in trainer.state.log_history if "reward" in entry))
    adapeft.delta(model).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

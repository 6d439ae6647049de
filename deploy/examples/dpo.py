"""DPO with TRL on an attached model, whose reference is the policy at the start.

python deploy/examples/dpo.py MODEL pairs.jsonl delta.safetensors
python deploy/examples/dpo.py --reference disk MODEL pairs.jsonl delta.safetensors

The log probabilities of the reference are computed once, before the first step, without a second copy of the model; or
in every step by a second model that is loaded from MODEL, which may be any other.

MODEL: folder or hub name of a causal language model; pairs.jsonl: lines with `prompt`, `chosen` and `rejected`. Needs
`pip install 'adapeft[trl]'`.
"""

import argparse

import torch
import torch.nn.functional as F
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import adapeft

BETA = 0.1


def preference_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return DPO's loss of every pair at the start, where the model is its own reference.

    Args:
        generator: generator of the preferences that are drawn from the model; None: the true ones.
    """
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    log_probs = (logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0] * mask).sum(1)
    chosen, rejected = (log_probs - log_probs.detach()).chunk(2)
    margins = BETA * (chosen - rejected)
    preferred = torch.ones_like(margins)
    if generator is not None:
        preferred = torch.bernoulli(margins.sigmoid(), generator=generator)
    return F.binary_cross_entropy_with_logits(margins, preferred, reduction="none")


def main(name: str, pairs: str, out: str, reference: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=pairs, split="train")

    # Chosen by the loss of DPO itself, on the batches of TRL's own collator.
    collate = DataCollatorForPreference(tokenizer.pad_token_id)
    rows = [
        {
            "prompt_ids": tokenizer(row["prompt"])["input_ids"],
            "chosen_ids": [*tokenizer(row["chosen"])["input_ids"], tokenizer.eos_token_id],
            "rejected_ids": [*tokenizer(row["rejected"])["input_ids"], tokenizer.eos_token_id],
        }
        for row in data.select(range(min(64, len(data))))
    ]
    batches = [collate(rows[start : start + 4]) for start in range(0, len(rows), 4)]
    adapeft.attach(model, adapeft.select(model, batches, loss=preference_loss, budget="1%"))

    from_disk = None
    if reference == "disk":
        from_disk = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    options = DPOConfig(
        output_dir=f"{out}.trainer",
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        beta=BETA,
        precompute_ref_log_probs=reference == "start",
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    trainer = DPOTrainer(model, from_disk, args=options, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses", *losses)
    adapeft.delta(model).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", choices=["start", "disk"], default="start")
    for argument in ("name", "pairs", "out"):
        parser.add_argument(argument)
    main(**vars(parser.parse_args()))

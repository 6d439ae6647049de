"""A plain training loop with accelerate on an attached model, on one device, several, or under DeepSpeed.

accelerate launch deploy/examples/accelerate_loop.py MODEL texts.jsonl delta.safetensors
accelerate launch --use_deepspeed --zero_stage 2 deploy/examples/accelerate_loop.py MODEL texts.jsonl delta.safetensors

MODEL: folder or hub name of a causal language model; texts.jsonl: lines with `text`. Needs `pip install accelerate`.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import adapeft


def main(name: str, texts: str, out: str) -> None:
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=texts, split="train")
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    data = data.remove_columns("text")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    # Chosen once, before anything is wrapped or divided; every process attaches the saved subset.
    chosen = Path(f"{out}.subset")
    if accelerator.is_main_process:
        some = data.select(range(min(256, len(data))))
        adapeft.select(model, DataLoader(some, batch_size=8, collate_fn=collate), budget="1%").save(chosen)
    accelerator.wait_for_everyone()
    adapeft.attach(model, adapeft.Subset.load(chosen))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    model.train()
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
    accelerator.print("losses", *losses)
    delta = adapeft.delta(model)  # on every process, because it gathers what is divided
    if accelerator.is_main_process:
        delta.save(out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])

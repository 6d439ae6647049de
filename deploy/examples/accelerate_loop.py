"""A plain training loop with accelerate on an attached model, on one device, several, or under DeepSpeed.

accelerate launch deploy/examples/accelerate_loop.py MODEL texts.jsonl delta.safetensors
accelerate launch --use_deepspeed --zero_stage 2 deploy/examples/accelerate_loop.py MODEL texts.jsonl delta.safetensors

MODEL: folder or hub name of a causal language model; texts.jsonl: lines with `text`. Needs `pip install accelerate`.
Tested on CPUs: one process, two, and ZeRO-2. FSDP2, which accelerate enables on accelerators only, is not tested here
(torch's own `fully_shard` is, on two CPU ranks with gloo).
Each epoch ends with a checkpoint in delta.safetensors.states that holds no frozen weights; the same command resumes
from the newest one.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import adapeft


def leave_out_frozen(models: list, weights: list, folder: str) -> None:
    """Remove frozen weights from what `save_state` writes; under DeepSpeed, which writes its own, there is nothing."""
    for model, state in zip(models, weights, strict=False):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                del state[name]


def main(name: str, texts: str, out: str) -> None:
    set_seed(0)
    # The order of an epoch then depends only on the seed and its number, also after resuming.
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    accelerator.register_save_state_pre_hook(leave_out_frozen)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=texts, split="train")
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    data = data.remove_columns("text")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    # Chosen once, before anything is wrapped or divided; every process attaches the saved subset.
    chosen, states = Path(f"{out}.subset"), Path(f"{out}.states")
    if accelerator.is_main_process and not chosen.exists():
        some = data.select(range(min(256, len(data))))
        adapeft.select(model, DataLoader(some, batch_size=8, collate_fn=collate), budget="1%").save(chosen)
    accelerator.wait_for_everyone()
    adapeft.attach(model, adapeft.Subset.load(chosen))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    done = max((int(path.name.removeprefix("epoch-")) for path in states.glob("epoch-*")), default=0)
    if done:
        # The frozen weights are those of the base and the subset that are loaded and attached above.
        is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        accelerator.load_state(states / f"epoch-{done}", **{"load_module_strict" if is_deepspeed else "strict": False})
    losses = []
    model.train()
    for epoch in range(done, 3):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
        accelerator.save_state(states / f"epoch-{epoch + 1}", exclude_frozen_parameters=True)  # read by DeepSpeed only
    accelerator.print("losses", *losses)
    delta = adapeft.delta(model)  # on every process, because it gathers what is divided
    if accelerator.is_main_process:
        delta.save(out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])

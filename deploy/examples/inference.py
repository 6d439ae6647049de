"""Generating with an attached model after training, and with what can be made of it: all of them compute the same.

python deploy/examples/inference.py MODEL texts.jsonl merged

MODEL: folder or hub name of a causal language model; texts.jsonl: lines with `text`; merged: folder for the trained
model as a plain checkpoint. torch.compile needs a C++ compiler.
"""

import copy
import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import adapeft


def main(name: str, texts: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=texts, split="train")
    prompt = tokenizer(data[0]["text"][: len(data[0]["text"]) // 2], return_tensors="pt")
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    data = data.remove_columns("text")
    loader = DataLoader(data, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    adapeft.attach(model, adapeft.select(model, loader, budget="1%"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    model.train()
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    adapeft.merge(adapeft.delta(model), name, out)
    compiled = copy.deepcopy(model)
    compiled.compile()  # in place, so that generate calls it too; torch.compile(model) serves calls of the model itself
    models = {
        "attached": model,
        "copied": copy.deepcopy(model),
        "compiled": compiled,
        "merged": AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32),
    }
    with torch.no_grad():
        expected = model(**prompt).logits
        with adapeft.base(model):
            print("difference base", (model(**prompt).logits - expected).abs().max().item())
        for kind, one in models.items():
            print("difference", kind, (one(**prompt).logits - expected).abs().max().item())
    for kind, one in models.items():
        tokens = one.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        print("generated", kind, repr(tokenizer.decode(tokens)))


if __name__ == "__main__":
    main(*sys.argv[1:])

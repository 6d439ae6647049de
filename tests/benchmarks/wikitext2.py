"""A small language model on WikiText-2: trained from nothing for minutes, then measured, chosen and tuned under ZeRO-3.

``python -m tests.benchmarks.wikitext2 --out runs/benchmarks/wikitext2`` trains a byte-pair tokenizer and a GPT-2 on the
first half of the training text, runs ``adapeft run deploy/configs/wikitext2.yaml`` once for each method on all of it,
and writes ``tests/benchmarks/results/wikitext2.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_scheduler, set_seed

from tests.benchmarks.report import RESULTS, machine

TEXT = Path("../shared/data/wikitext2/train.txt")
CONFIG = "deploy/configs/wikitext2.yaml"
VOCABULARY, LENGTH, BATCH = 4096, 128, 16
METHODS = {
    "adapeft, rows": ["select.groups=row"],
    "random, rows": ["select.method=random", "select.groups=row"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="of training the base model")
    arguments = parser.parse_args()

    base = arguments.out / "base"
    if not (base / "config.json").is_file():
        train_base(base, arguments.steps)
    lines = ["| method | perplexity before | after | trained | of | influence | gap |", "|" + "---|" * 7]
    for name, overrides in METHODS.items():
        output = arguments.out / name.replace(", ", "-")
        command = ["adapeft", "run", CONFIG, f"model.name={base}", f"output={output}", *overrides]
        subprocess.run(command, check=True)
        lines.append(as_row(name, json.loads((output / "metrics.json").read_text())))
    command = f"python -m tests.benchmarks.wikitext2 {' '.join(sys.argv[1:])}"
    report = RESULTS / "wikitext2.md"
    report.write_text(f"# wikitext2\n\n`{command}`\n\n{machine()} Two workers, ZeRO-3.\n\n" + "\n".join(lines) + "\n")
    print(report.read_text())


def train_base(folder: Path, num_steps: int) -> None:
    """Tokenizer and model on the first half of the text."""
    text = TEXT.read_text()
    half = text[: len(text) // 2]
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(half.splitlines(), vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    tokens = torch.tensor(tokenizer(half, verbose=False)["input_ids"])
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    set_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=192, n_layer=4, n_head=6, bos_token_id=end, eos_token_id=end
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=num_steps)
    started = time.perf_counter()
    for step in range(num_steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"base: step {step + 1}/{num_steps}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    model.save_pretrained(folder)


def as_row(name: str, metrics: dict) -> str:
    """A run in a line."""
    choice = metrics["choice"]
    influence = "–" if choice["value"] is None else f"{choice['value']:.4g}"
    gap = "–" if choice["gap"] is None else f"{choice['gap']:.1e}"
    return (
        f"| {name} | {metrics['before']['perplexity']:.1f} | {metrics['after']['perplexity']:.1f} "
        f"| {metrics['trainable_parameters']:,} | {metrics['total_parameters']:,} | {influence} | {gap} |"
    )


if __name__ == "__main__":
    main()

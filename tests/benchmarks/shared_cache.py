"""Seconds to load a large data set and memory of each process that does, for one and for two processes at once.

    python -m tests.benchmarks.shared_cache --tokenizer FOLDER [--rows 1000000]

Prints a table. Every figure is of new processes that read, check and tokenize both splits as a worker does; the first
line of a number of processes starts with an empty cache, the second with what the first has left. The line above them
is the tokenizer alone, over the texts of the training split.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WORKER = """
import sys, time
import psutil
from adapeft.data.sources import rows_of
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from transformers import AutoTokenizer
import adapeft.tasks.tokens.tokenize
from adapeft.data.cache import Cache
path, evaluation = sys.argv[1:3]
task = TASKS["sequence-classification"]
data = task.data(train=path, evaluation=evaluation, max_length=32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
process = psutil.Process()
before = process.memory_full_info()
start = time.monotonic()
description = describe(task, data)
splits = [task.tokenize(rows_of(data, field), data, tokenizer, description, Cache())
          for field in ("data.train", "data.evaluation")]
seconds = time.monotonic() - start
for first in range(0, len(splits[0]), 50_021):
    splits[0].collate(range(first, min(first + 32, len(splits[0]))))
print("ready", flush=True)
sys.stdin.readline()
after = process.memory_full_info()
print(seconds, (after.uss - before.uss) / 2**20, (after.pss - before.pss) / 2**20, flush=True)
sys.stdin.readline()
"""

TOKENIZER = """
import json, sys, time
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
start = time.monotonic()
for first in range(0, len(texts), 1000):
    tokenizer(texts[first : first + 1000], truncation=True, max_length=32)
print(time.monotonic() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", required=True, help="folder of a model with a tokenizer")
    arguments = parser.parse_args()
    print("| workers | cache | seconds | USS per worker, MiB | PSS per worker, MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        texts = _rows(Path(folder) / "train.jsonl", arguments.rows)
        command = [sys.executable, "-c", TOKENIZER, texts, arguments.tokenizer]
        print(f"| | tokenizer alone | {float(subprocess.check_output(command)):.1f} | | |", flush=True)
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            paths = [
                _rows(Path(folder) / "train.jsonl", arguments.rows),
                _rows(Path(folder) / "evaluation.jsonl", 1000),
            ]
            for state in ("empty", "filled"):
                figures = _measured(count, [*paths, arguments.tokenizer], folder)
                shown = [", ".join(f"{figure:.1f}" for figure in column) for column in zip(*figures, strict=True)]
                print(f"| {count} | {state} | {' | '.join(shown)} |", flush=True)


def _rows(path: Path, number: int) -> str:
    with path.open("w") as file:
        for row in range(number):
            words = " ".join(f"word{(row * 7919 + place) % 997}" for place in range(4 + row % 5))
            file.write(json.dumps({"text": words, "label": row % 2}) + "\n")
    return str(path)


def _measured(count: int, arguments: list[str], folder: str) -> list[list[float]]:
    """Return seconds, USS and PSS of processes that start at the same time and all live when they are measured."""
    environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache"}
    command = [sys.executable, "-c", WORKER, *arguments]
    workers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    figures = []
    for worker in workers:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        figures.append([float(figure) for figure in worker.stdout.readline().split()])
    for worker in workers:
        worker.communicate("\n")
    return figures


if __name__ == "__main__":
    main()

"""Two tasks that no rule of adapeft was set on, made from data of other tasks, for ``results/unseen.md``.

    python -m tests.benchmarks.unseen --out runs/unseen

``pipes``: whether the command that an instruction of nl2bash asks for is a pipeline. ``entities``: the number of named
entities in a sentence of CoNLL 2003, five or more as five. 4,000 examples to train on and up to 1,000 to evaluate.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

DATA = Path("../shared/data")
SIZES = {"train": 4000, "validation": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON lines")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        for task, examples in (("pipes", pipes(split)), ("entities", entities(split))):
            path = arguments.out / f"{task}-{split}.jsonl"
            chosen = [example for example, _ in zip(examples, range(count), strict=False)]
            path.write_text("".join(json.dumps(example) + "\n" for example in chosen), encoding="utf-8")
            print(f"{path}: {len(chosen)} examples")


def pipes(split: str) -> Iterator[dict[str, Any]]:
    for row in _shuffled(DATA / "nl2bash" / f"{split}.jsonl"):
        yield {"text": row["prompt"], "label": "pipeline" if "|" in row["completion"] else "command"}


def entities(split: str) -> Iterator[dict[str, Any]]:
    for row in _shuffled(DATA / "conll2003" / f"{split}.jsonl"):
        if len(row["tokens"]) > 4:
            yield {"text": " ".join(row["tokens"]), "label": float(min(num_entities(row["ner_tags"]), 5))}


def num_entities(tags: list[str]) -> int:
    """Return the number of entities of a sentence from its tags (O, B-PER, I-PER, …)."""
    return sum(tag != "O" and (tag.startswith("B") or before[2:] != tag[2:]) for before, tag in pairwise(["O", *tags]))


def _shuffled(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return rows


if __name__ == "__main__":
    main()

"""Memory: estimates of ``adapeft estimate`` compared with measured peaks of ranks.

``python -m tests.benchmarks.memory MODEL DATA`` (DATA: a folder with CoLA as JSON lines) adds one row per setting to
``results/memory.md``; ``… MODEL DATA 3:2`` runs only ZeRO stage 3 with two ranks. The ranks are CPU processes of
torchrun and run the same functions as with Ray; the memory of a rank is its peak resident set size.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from adapeft.config.config import Config
from adapeft.config.load import load_config, parse_select
from adapeft.sections.select import Select
from tests.support.torchrun import leave

SETTINGS = [(stage, workers) for workers in (1, 2) for stage in (0, 1, 2, 3)]
RESULTS = Path(__file__).parent / "results" / "memory.md"
BATCH_SIZE, NUM_TOKENS = 32, 64


def main(model: str, data: Path, settings: list[tuple[int, int]]) -> None:
    """Measure by row, then train all parameters, and compare the peak memory of both for each setting."""
    for stage, workers in settings:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            path = write_config(folder, model, data, stage, workers)
            said = estimated(load_config(path), folder / "all.safetensors")
            cells: list[object] = [stage, workers]
            for what in ("measuring", "training"):
                used = run(workers, path, what)
                cells += [f"{said[what] / 2**20:.0f}", f"{used / 2**20:.0f}", f"{said[what] / used - 1:+.1%}"]
        with RESULTS.open("a") as file:
            file.write(f"| {' | '.join(map(str, cells))} |\n")


def write_config(folder: Path, model: str, data: Path, stage: int, workers: int) -> Path:
    """Write a config, and data in which every example has the maximum length."""
    for name, number in (("train", 256), ("validation", 32)):
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        texts = [" ".join(row["text"] for row in rows[start : start + 32]) for start in range(number)]
        lines = [json.dumps({"text": text, "label": index % 2}) + "\n" for index, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tree = {
        "model": {"name": model, "task": "sequence-classification"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "evaluation": str(folder / "validation.jsonl"),
            "max_length": NUM_TOKENS,
        },
        "output": str(folder / "run"),
        "select": {"calibration": 4 * BATCH_SIZE, "batch_size": BATCH_SIZE, "warmup_steps": 2},
        "train": {"batch_size": BATCH_SIZE, "max_steps": 3},
        "cluster": {"workers": workers, "zero_stage": stage},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return path


def estimated(config: Config, everything: Path) -> dict[str, int]:
    """Return the estimated bytes on a device for each stage; write the subset to train to ``everything``."""
    from cluster.inspection.estimate import estimate_of
    from cluster.inspection.inspect import inspect
    from cluster.zero.settings import zero_of

    zero = zero_of(config.cluster)
    by_row = estimate_of(config, inspect(config))
    common = config.select.model_dump(include=set(Select.model_fields))
    settings = parse_select({**common, "method": "full", "groups": "tensor"})
    full = config.model_copy(update={"select": settings})
    of_all = estimate_of(full, inspect(full))
    of_all.subset.save(everything)
    return {"measuring": by_row.memory(zero)["measuring"].total, "training": of_all.memory(zero)["training"].total}


def run(workers: int, config: Path, what: str) -> int:
    """Run a stage and return the largest peak memory of its ranks, in bytes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    subprocess.run([*launch, "-m", "tests.benchmarks.memory", "--rank", str(config), what], check=True)
    return int((config.parent / what).read_text())


def on_rank(config: Config, folder: Path, what: str) -> None:
    """Run one stage on this rank; rank 0 writes the peak memory."""
    import torch.distributed as dist

    from cluster.output.folder import RunFolder
    from cluster.ranks.finetune import finetune
    from cluster.ranks.measure import measure_and_choose

    RunFolder.of(config).path.mkdir(exist_ok=True)
    if what == "measuring":
        peak = measure_and_choose(config, lambda event: None, limit=None)["measuring_peak_memory_bytes"]
    else:
        if os.environ["RANK"] == "0":  # the others wait for rank 0 when they join
            shutil.copy(folder / "all.safetensors", RunFolder.of(config).subset)
        peak = finetune(config, lambda event: None)["peak_memory_bytes"]
    if dist.get_rank() == 0:
        (folder / what).write_text(str(peak))
    leave()


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        on_rank(load_config(sys.argv[2]), Path(sys.argv[2]).parent, sys.argv[3])
    else:
        chosen = [(int(text[0]), int(text[2])) for text in sys.argv[3:]]
        main(sys.argv[1], Path(sys.argv[2]).resolve(), chosen or SETTINGS)

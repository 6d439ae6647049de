"""Memory: what ``adapeft estimate`` says against what a run really used.

``python -m tests.benchmarks.memory MODEL DATA`` (DATA: a folder with CoLA as JSON lines) writes ``results/memory.md``,
a row a setting as it is done; ``… MODEL DATA 3:2:32`` runs stage 3 with two workers and batches of 32 alone. On a CPU a
rank's memory is its resident set, on a GPU what torch's allocator held.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from adapeft.config import Config
from adapeft.config_file import load_config
from cluster.estimate import estimate_of
from cluster.inspect import inspect
from cluster.zero import zero_of

COMMAND = Path(sys.executable).with_name("adapeft")
SETTINGS = [(stage, workers, 32) for workers in (1, 2) for stage in (0, 1, 2, 3)] + [(2, 1, 64), (3, 2, 64)]
NUM_TOKENS = 64
RESULTS = Path(__file__).parent / "results" / "memory.md"
HEAD = f"""# Memory: estimated and used

The largest of the ranks' peak memory, of a run (two and more steps of {NUM_TOKENS} tokens an example, each full) of
MiniLM (22.7 M parameters, float32) by row at 0.5 %, on a CPU. Error: what the estimate says too much.

| stage | workers | batch | measuring, estimated | used | error | training, estimated | used | error |
|---|---|---|---|---|---|---|---|---|
"""


def main(model: str, data: Path, settings: list[tuple[int, int, int]]) -> None:
    """Runs every setting in a folder of its own and adds its row."""
    for stage, workers, batch_size in settings:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            config = write_config(folder, model, data, stage, workers, batch_size)
            subprocess.run([COMMAND, "run", str(config)], check=True)
            metrics = json.loads((folder / "run" / "metrics.json").read_text())
            loaded = load_config(config)
            add_row(loaded, estimated(loaded), metrics)


def write_config(folder: Path, model: str, data: Path, stage: int, workers: int, batch_size: int) -> Path:
    """A config, and data of which every example is as long as it may be."""
    for name, number in (("train", 512), ("validation", 64)):
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
        "select": {"calibration": 4 * batch_size, "batch_size": batch_size, "warmup_steps": 4},
        "train": {"batch_size": batch_size, "max_steps": 4},
        "cluster": {"workers": workers, "zero_stage": stage},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return path


def estimated(config: Config) -> dict[str, int]:
    """Bytes by stage of the run, before it has chosen."""
    found = estimate_of(config.model_copy(update={"output": "not-there"}), inspect(config))
    return {name: held.total for name, held in found.memory(zero_of(config.cluster)).items()}


def add_row(config: Config, estimate: dict[str, int], metrics: dict) -> None:
    """To the table."""
    if not RESULTS.is_file():
        RESULTS.write_text(HEAD)
    cells: list[object] = [config.cluster.zero_stage, config.cluster.workers, config.train.batch_size]
    for name, key in (("measuring", "measuring_peak_memory_bytes"), ("training", "peak_memory_bytes")):
        said, used = estimate[name], metrics[key]
        cells += [f"{said / 2**20:.0f} MiB", f"{used / 2**20:.0f} MiB", f"{said / used - 1:+.1%}"]
    with RESULTS.open("a") as file:
        file.write(f"| {' | '.join(map(str, cells))} |\n")


if __name__ == "__main__":
    chosen = [tuple(map(int, text.split(":"))) for text in sys.argv[3:]]
    main(sys.argv[1], Path(sys.argv[2]).resolve(), chosen or SETTINGS)  # type: ignore[arg-type]

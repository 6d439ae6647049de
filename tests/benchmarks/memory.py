"""Memory: estimates of ``adapeft estimate`` compared with the peaks that ``adapeft run`` reports.

``python -m tests.benchmarks.memory CASE MODEL DATA [STAGE:WORKERS[:LAUNCHER] …] [--methods NAME …]
[--quantization TYPE] [--offload PLACE]`` appends one row per setting and method to ``results/memory.md``. CASE:
``classifier`` (MODEL: an encoder such as MiniLM, DATA: a folder with CoLA as JSON lines) or ``language-model`` (MODEL:
such as SmolLM2, DATA: a folder with ``train.txt`` and ``validation.txt``). TYPE: ``int8`` or ``nf4``, see
``model.quantization``. PLACE: ``cpu`` or ``nvme``, see ``cluster.offload``. LAUNCHER: ``local`` (the default) or
``ray``. The workers run on CPUs; the memory of a worker is its peak resident set size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapeft.config.load import load_config

Setting = tuple[int, int, str]
"""ZeRO stage, workers, launcher."""
SETTINGS: list[Setting] = [(stage, workers, "local") for workers in (1, 2) for stage in (0, 1, 2, 3)]
METHODS: dict[str, dict[str, Any]] = {
    "rows, exact": {"groups": "row", "measure": "exact"},
    "rows, low rank": {"groups": "row", "measure": "low-rank"},
    "elements, exact": {"groups": "element", "measure": "exact"},
    "elements, low rank": {"groups": "element", "measure": "low-rank"},
    "sam": {"method": "sam", "groups": "element"},
    "random rows": {"method": "random", "groups": "row"},
    "lora": {"method": "lora"},
    "full": {"method": "full", "groups": "tensor", "budget": "100%"},
}
RESULTS = Path(__file__).parent / "results" / "memory.md"


@dataclass(frozen=True)
class Case:
    """A task, the size of its batches and how its data are written to a folder."""

    model: dict[str, Any]
    data: Callable[[Path, Path], dict[str, Any]]
    batch_size: int
    budget: str


def sentences(source: Path, folder: Path) -> dict[str, Any]:
    """Write examples that all have the maximum length, 64 tokens."""
    for name, number in (("train", 256), ("validation", 32)):
        rows = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        texts = [" ".join(row["text"] for row in rows[start : start + 32]) for start in range(number)]
        lines = [json.dumps({"text": text, "label": index % 2}) + "\n" for index, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {"train": str(folder / "train.jsonl"), "evaluation": str(folder / "validation.jsonl"), "max_length": 64}


def texts(source: Path, folder: Path) -> dict[str, Any]:
    """Write the beginning of each text; all blocks have 128 tokens."""
    for name, number in (("train", 100_000), ("validation", 10_000)):
        (folder / f"{name}.txt").write_text((source / f"{name}.txt").read_text()[:number])
    return {"train": str(folder / "train.txt"), "evaluation": str(folder / "validation.txt"), "max_length": 128}


CASES = {
    "classifier": Case({"task": "sequence-classification"}, sentences, 32, "0.5%"),
    "language-model": Case({"task": "causal-lm", "dtype": "bfloat16"}, texts, 8, "0.25%"),
}


def main(
    case: str,
    model: str,
    data: Path,
    settings: list[Setting],
    methods: list[str],
    quantization: str | None,
    offload: str,
) -> None:
    stored = {} if quantization is None else {"quantization": quantization}
    of_case = replace(CASES[case], model={**CASES[case].model, **stored})
    for setting in settings:
        for method in methods:
            with tempfile.TemporaryDirectory() as temporary:
                path = write_config(Path(temporary), of_case, METHODS[method], model, data, setting, offload)
                said, used = estimated(path), run(path)
            where = "{} x {}, {}".format(*setting) + ("" if offload == "none" else f", {offload}")
            cells = [", ".join([Path(model).name, *stored.values()]), method, where]
            for what in ("measuring", "training"):
                cells += compared(said[what], used[what]) if what in used and what in said else ["", "", ""]
            with RESULTS.open("a") as file:
                file.write(f"| {' | '.join(cells)} |\n")


def setting_of(text: str) -> Setting:
    stage, workers, *launcher = text.split(":")
    return int(stage), int(workers), launcher[0] if launcher else "local"


def compared(said: int, used: int) -> list[str]:
    return [f"{said / 2**20:.0f}", f"{used / 2**20:.0f}", f"{said / used - 1:+.1%}"]


def write_config(
    folder: Path,
    case: Case,
    method: dict[str, Any],
    model: str,
    data: Path,
    setting: Setting,
    offload: str,
) -> Path:
    stage, workers, launcher = setting
    away = {"offload": offload}
    if offload == "nvme":
        away["offload_folder"] = str(folder / "drive")
        (folder / "drive").mkdir()
    calibration = {"calibration": 4 * case.batch_size, "batch_size": case.batch_size, "warmup_steps": 2}
    measures = method.get("method", "adapeft") in ("adapeft", "sam")
    tree = {
        "model": {"name": model, **case.model},
        "data": case.data(data, folder),
        "output": str(folder / "run"),
        "select": {"budget": case.budget, **(calibration if measures else {}), **method},
        "train": {"learning_rate": 1e-3, "batch_size": case.batch_size, "max_steps": 4},
        "cluster": {"workers": workers, "zero_stage": stage, "launcher": launcher, **away},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return path


def estimated(path: Path) -> dict[str, int]:
    """Return the estimated bytes of a worker for each stage, before anything is measured."""
    from cluster.inspection.estimate import estimate_of
    from cluster.inspection.inspect import inspect
    from cluster.zero.settings import zero_of

    config = load_config(path)
    held = estimate_of(inspect(config)).memory(zero_of(config.cluster))
    return {stage: memory.total for stage, memory in held.items()}


def run(path: Path) -> dict[str, int]:
    """Run the config and return the largest peak of its workers in each stage, in bytes."""
    subprocess.run([sys.executable, "-m", "adapeft", "run", str(path)], check=True)
    metrics = json.loads((path.parent / "run" / "metrics.json").read_text())
    keys = {"measuring": "measuring_peak_memory_bytes", "training": "peak_memory_bytes"}
    return {stage: metrics[key] for stage, key in keys.items() if metrics.get(key)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", nargs="*", type=setting_of)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quantization", choices=["int8", "nf4"])
    parser.add_argument("--offload", choices=["none", "cpu", "nvme"], default="none")
    given = parser.parse_args()
    settings = given.settings or SETTINGS
    main(given.case, given.model, given.data.resolve(), settings, given.methods, given.quantization, given.offload)

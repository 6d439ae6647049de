"""Time to swap deltas on a loaded model, compared with loading another checkpoint and switching PEFT adapters.

    python -m tests.benchmarks.swap MODEL > tests/benchmarks/results/swap.md

MODEL is the folder of a sentence encoder such as BERT. Takes one or two minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from adapeft import Delta, Deltas
from adapeft.formats.peft.folder import save_for_peft
from adapeft.model.structure import describe_parameters
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from tests.oracles.deltas import drawn_delta
from tests.oracles.leaves import changed, weights

SHARE, SMALL_SHARE = 0.005, 0.0001
ROUNDS = 31
TOKENS = 64
NAMES = ("first", "second")
CHECKPOINT = "`from_pretrained` of a merged checkpoint"


@dataclass(frozen=True)
class Way:
    """A way of switching between two deltas.

    Attributes:
        name: name in the table.
        count: number of stored values per delta.
        use: function that switches to the delta of a name.
        model: function that returns the model to call afterwards.
        base: function that removes the delta and returns the model; None if there is none.
    """

    name: str
    count: int
    use: Callable[[str], object]
    model: Callable[[], nn.Module]
    base: Callable[[], nn.Module] | None = None


def load(source: str | Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(source).eval()
    return model


def parts_of(model: nn.Module, kind: str, share: float, seed: int) -> dict[str, Part]:
    """Return parts for a share of the model in its blocks' linear layers: random elements or rows, or LoRA."""
    infos = describe_parameters(model)
    linear = [info for info in infos if info.is_linear and info.layer >= 0]
    budget = share * sum(info.count for info in infos)
    inside = budget / sum(info.count for info in linear)
    rank = int(budget / sum(sum(info.shape) for info in linear))
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)[: max(1, int(inside * size))].sort().values

    if kind == "lora":
        return {info.name: Lora(info.shape, 0, rank, float(rank)) for info in linear}
    if kind == "rows":
        return {info.name: Rows(info.shape, draw(info.shape[0])) for info in linear}
    return {info.name: Elements(info.shape, draw(info.count)) for info in linear}


def deltas_of(source: str, kind: str, share: float = SHARE) -> dict[str, Delta]:
    model = load(source)
    return {name: drawn_delta(model, parts_of(model, kind, share, seed), seed) for seed, name in enumerate(NAMES)}


def swapping(source: str, kind: str, share: float = SHARE) -> Way:
    model, deltas = load(source), deltas_of(source, kind, share)
    swapped = Deltas(model, deltas)

    def base() -> nn.Module:
        swapped.use(None)
        return model

    label = "LoRA" if kind == "lora" else kind
    return Way(f"`Deltas.use`, {label}, {share:.2%}", deltas[NAMES[0]].count, swapped.use, lambda: model, base)


def switching_peft(source: str, folder: Path, *, merged: bool) -> Way:
    deltas = deltas_of(source, "lora")
    for name, delta in deltas.items():
        if not (folder / name).exists():
            save_for_peft(delta, source, folder / name)
    first, second = NAMES
    model = PeftModel.from_pretrained(load(source), folder / first, adapter_name=first).eval()
    model.load_adapter(folder / second, second)
    if not merged:
        return Way(
            f"PEFT, LoRA, {SHARE:.2%}: `set_adapter`",
            deltas[first].count,
            model.set_adapter,
            lambda: model,
            model.unload,
        )
    model.merge_adapter([first])

    def merge_other(name: str) -> None:
        model.unmerge_adapter()
        model.merge_adapter([name])

    def base() -> nn.Module:
        model.unmerge_adapter()
        return model.unload()

    title = f"PEFT, LoRA, {SHARE:.2%}: `unmerge_adapter`, `merge_adapter`"
    return Way(title, deltas[first].count, merge_other, lambda: model, base)


def loading(source: str, folder: Path) -> Iterator[Way]:
    """Yield two ways: load the whole model again, and load the tensors into the same model."""
    for name, delta in deltas_of(source, "elements").items():
        model = load(source)
        delta.apply(model)
        model.save_pretrained(folder / f"merged-{name}")
    held, in_place = {"model": load(source)}, load(source)
    count = sum(parameter.numel() for parameter in in_place.parameters())

    def load_anew(name: str) -> None:
        held["model"] = load(folder / f"merged-{name}")

    def load_tensors(name: str) -> None:
        in_place.load_state_dict(load_file(folder / f"merged-{name}" / "model.safetensors"))

    yield Way(CHECKPOINT, count, load_anew, lambda: held["model"])
    yield Way("its tensors by `load_state_dict`", count, load_tensors, lambda: in_place)


@torch.no_grad()
def measure(ways: Sequence[Way]) -> dict[str, tuple[list[float], list[float]]]:
    """Return seconds of the switches and following forward passes by way; every round runs all ways in random order."""
    times: dict[str, tuple[list[float], list[float]]] = {way.name: ([], []) for way in ways}
    tokens = torch.arange(1000, 1000 + TOKENS)[None]
    order = random.Random(0)
    for number in range(ROUNDS + 1):
        for way in order.sample(ways, len(ways)):
            started = time.process_time()
            way.use(NAMES[number % 2])
            switched = time.process_time()
            way.model()(tokens)
            forward = time.process_time() - switched
            if number:  # the first round warms up
                times[way.name][0].append(switched - started)
                times[way.name][1].append(forward)
    return times


def _moved(base: dict[str, torch.Tensor], model: nn.Module) -> int:
    """Return the number of base entries whose bits have changed."""
    return sum(int(mask.sum()) for mask in changed(base, weights(model)).values())


def _middle(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return f"{median(ordered) * 1e3:.2f} ({ordered[quarter] * 1e3:.2f} – {ordered[-1 - quarter] * 1e3:.2f})"


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    source = parser.parse_args().model
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = [
            swapping(source, "elements"),
            swapping(source, "elements", SMALL_SHARE),
            swapping(source, "rows"),
            swapping(source, "lora"),
            switching_peft(source, folder, merged=False),
            switching_peft(source, folder, merged=True),
            *loading(source, folder),
        ]
        times = measure(ways)

    print("# Swapping deltas\n")
    print("`python -m tests.benchmarks.swap MODEL > tests/benchmarks/results/swap.md`\n")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}.\n")
    print(f"The machine's load at the end was {os.getloadavg()[0]:.0f}: above 1, other jobs shared its cores.\n")
    model = load(source)
    base = weights(model)
    print(
        f"{type(model).__name__} of {sum(value.numel() for value in base.values()):,} parameters in float32; two "
        f"deltas with random values, used alternately, of at most the given share of the model, in the linear layers "
        f"of its blocks (LoRA has the largest rank within the share). Milliseconds of CPU time on one thread, median "
        f"(quartiles) of {ROUNDS} rounds that each run all ways in random order; waiting for the disk is not counted, "
        f"and the checkpoints were cached. Forward: one pass over {TOKENS} tokens after the switch. Base entries "
        f"moved: entries whose bits differ from the base after the last delta was removed.\n"
    )
    reference = median(times[CHECKPOINT][0])
    print("| way | switch, ms | `from_pretrained` takes | forward, ms | values per delta | base entries moved |")
    print("|---|---:|---:|---:|---:|---:|")
    for way in ways:
        switches, forwards = times[way.name]
        moved = "–" if way.base is None else f"{_moved(base, way.base()):,}"
        cells = (way.name, _middle(switches), f"{reference / median(switches):,.1f} times this", _middle(forwards))
        print(f"| {' | '.join(cells)} | {way.count:,} | {moved} |")


if __name__ == "__main__":
    main()

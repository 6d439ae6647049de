"""Divided loading: peak host memory of each rank under ZeRO-3, next to its share of the weights.

``python -m tests.benchmarks.divided FOLDER`` writes a random Llama of 1.1 B parameters in bfloat16, in shards of at
most 500 MB, to FOLDER unless it is there, and adds one row per stage and number of ranks to ``results/divided.md``. The
ranks are CPU processes that run the functions of a run. Their memory is read from Linux's /proc during the stage:
anonymous memory, which includes everything that is allocated, and the resident set, which also counts pages of mapped
files. ``… FOLDER --ranks 2 --stages training`` runs one row alone.

Other bases are ``--base pickled``, the same Llama in pickled files, and ``--base mixture``, a Qwen3-MoE of 0.9 B
parameters whose experts are stored apart. These are only measured on or, with ``--stages loading key=value …``, only
loaded and divided, with overrides of the config.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from adapeft.config.load import load_config
from adapeft.deltas.delta import Delta
from adapeft.deltas.merge import merge
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from cluster.launch.resources import environment_of
from cluster.output.folder import RunFolder
from tests.support.checkpoints import save_tokenizer, write_text
from tests.support.ranks import leave

PIECES = "pieces.json"
RESULTS = Path(__file__).parent / "results" / "divided.md"
BASES = ("llama", "pickled", "mixture")
SHARD = "500MB"
ROOM = 10**9
"""Bytes of a rank beyond its share and the largest piece: the process with its libraries, and one step."""
_SECONDS = 0.005
"""Time between two readings of the memory."""


def main(folder: Path, kind: str, numbers: Sequence[int], stages: Sequence[str], overrides: Sequence[str]) -> None:
    """Run every stage with every number of ranks."""
    base = folder / kind
    if not base.is_dir():
        write_model(base, kind)
    pieces = json.loads((base / PIECES).read_text())
    for workers in numbers:
        config = write_config(folder, base, workers)
        for stage in stages:
            processes = 1 if stage == "merging" else workers
            started = time.perf_counter()
            anonymous, resident = peaks(processes, config, stage, overrides)
            share = 0 if stage == "merging" else pieces["total"] // workers
            sizes = (share, pieces["largest"], share + pieces["largest"] + ROOM, anonymous, resident)
            label = " ".join((kind, *overrides))
            cells = [
                *(label, stage, processes, *(f"{size / 1e9:.2f}" for size in sizes)),
                f"{time.perf_counter() - started:.0f}",
            ]
            with RESULTS.open("a") as file:
                file.write(f"| {' | '.join(map(str, cells))} |\n")


def write_model(folder: Path, kind: str) -> None:
    """Write the model, its tokenizer, a text, and the bytes of all its weights and of its largest piece.

    A piece is a shard, or a tensor of fused experts.
    """
    torch.manual_seed(0)
    model = (make_mixture() if kind == "mixture" else make_llama()).bfloat16()
    model.save_pretrained(folder, max_shard_size=SHARD)
    shards = sorted(folder.glob("*.safetensors"))
    largest = max(parameter.nbytes for parameter in model.parameters())
    if kind != "mixture":
        largest = max(shard.stat().st_size for shard in shards)
    total = sum(parameter.nbytes for parameter in model.parameters())
    (folder / PIECES).write_text(json.dumps({"total": total, "largest": largest}))
    if kind == "pickled":
        pickle(folder, shards)
    save_tokenizer(folder)
    write_text(folder / "train.txt", 4000)
    write_text(folder / "validation.txt", 300)


def make_llama() -> PreTrainedModel:
    """Return a Llama of 1.1 B parameters."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=512, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_mixture() -> PreTrainedModel:
    """Return a Qwen3-MoE of 0.9 B parameters, 16 experts in each of 8 layers."""
    config = Qwen3MoeConfig(
        vocab_size=32_000, hidden_size=1024, moe_intermediate_size=2048, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, num_experts=16, num_experts_per_tok=2, max_position_embeddings=512,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def pickle(folder: Path, shards: Sequence[Path]) -> None:
    """Replace safetensors by pickled files."""
    weight_map = {}
    for shard in shards:
        tensors = load_file(shard)
        name = shard.with_suffix(".bin").name.replace("model", "pytorch_model")
        weight_map.update(dict.fromkeys(tensors, name))
        torch.save(tensors, folder / name)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_config(folder: Path, base: Path, workers: int) -> Path:
    """Write the config of a run that measures by row and trains whole tensors."""
    tree = {
        "model": {"name": str(base), "task": "causal-lm", "dtype": "bfloat16", "gradient_checkpointing": True},
        "data": {"train": str(base / "train.txt"), "evaluation": str(base / "validation.txt"), "max_length": 32},
        "output": str(folder / f"run-{base.name}-{workers}"),
        "select": {
            "groups": "row",
            "measure": "low-rank",
            "budget": "0.1%",
            "calibration": 8,
            "batch_size": 4,
            "warmup_steps": 0,
        },
        "train": {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 2},
        "cluster": {"workers": workers, "zero_stage": 3},
    }
    path = folder / f"run-{base.name}-{workers}.yaml"
    path.write_text(json.dumps(tree))
    return path


def whole_tensors() -> Subset:
    """Return a subset of whole matrices in two layers."""
    shapes = {"self_attn.o_proj": (2048, 2048), "self_attn.k_proj": (512, 2048)}
    return Subset(
        {f"model.layers.{i}.{name}.weight": Whole(shape) for i in (0, 8) for name, shape in shapes.items()}, (), ()
    )


def peaks(count: int, config: Path, stage: str, overrides: Sequence[str]) -> tuple[int, int]:
    """Run a stage on ``count`` ranks and return the largest peaks of any rank: anonymous memory, resident set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    if stage != "merging":
        common |= environment_of(load_config(config, overrides).cluster)
    command = [sys.executable, "-m", "tests.benchmarks.divided", "--rank", str(config), stage, *overrides]
    ranks = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    largest = {"RssAnon": 0, "VmHWM": 0}
    while any(rank.poll() is None for rank in ranks):
        for rank in ranks:
            with suppress(OSError):
                found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{rank.pid}/status").read_text()))
                for name in largest.keys() & found.keys():
                    largest[name] = max(largest[name], int(found[name]) * 1024)
        time.sleep(_SECONDS)
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{stage} with {count} ranks failed")
    return largest["RssAnon"], largest["VmHWM"]


def on_rank(path: Path, stage: str, overrides: Sequence[str]) -> None:
    """Run one stage on this rank."""
    config = load_config(path, overrides)
    folder = RunFolder.of(config)
    if stage == "merging":
        merge(Delta.load(folder.delta), config.model.name, folder.path / f"merged-{time.time_ns()}")
        return
    from cluster.ranks.evaluate import evaluate
    from cluster.ranks.finetune import finetune
    from cluster.ranks.inputs import load_inputs
    from cluster.ranks.measure import measure_and_choose
    from cluster.zero.division import division_of
    from cluster.zero.engine import join

    folder.path.mkdir(exist_ok=True)
    if stage == "loading":
        join()
        load_inputs(config).model(division_of(config.cluster))
    elif stage == "measuring":
        measure_and_choose(config, lambda event: None)
    elif stage == "training":
        if os.environ["RANK"] == "0":  # the others wait for rank 0 when they join
            shutil.rmtree(folder.checkpoints, ignore_errors=True)  # of an earlier training, which would be resumed
            whole_tensors().save(folder.subset)
        finetune(config, lambda event: None)
    else:
        evaluate(config, lambda event: None, delta=None, base=False)
    leave()


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        on_rank(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("folder", type=Path)
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--base", choices=BASES, default="llama")
        parser.add_argument("--ranks", type=int, nargs="+", default=(2, 4))
        parser.add_argument("--stages", nargs="+", default=("measuring", "training", "evaluating", "merging"))
        given = parser.parse_args()
        main(given.folder.resolve(), given.base, given.ranks, given.stages, given.overrides)

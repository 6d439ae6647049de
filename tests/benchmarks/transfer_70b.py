"""Time and memory of transferring a small model's statistics to a model of 70 B parameters without weights.

``python -m tests.benchmarks.transfer_70b SMALL --out runs/benchmarks/70b`` writes
``tests/benchmarks/results/transfer-70b.md``. SMALL is the folder ``small`` written by
``python -m tests.benchmarks.transfer llama``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from transformers import LlamaConfig

from tests.benchmarks.report import RESULTS, machine

# The shape of Llama 2 70B.
LARGE = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path, help="run folder with statistics of a small Llama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="0.5%")
    arguments = parser.parse_args()

    large, found = arguments.out / "70b", arguments.out / "transferred"
    LARGE.save_pretrained(large)
    started = time.perf_counter()
    command = ("transfer", "--from", arguments.small, "--to", large, f"budget={arguments.budget}", "groups=tensor")
    subprocess.run(["adapeft", *map(str, command), f"output={found}"], check=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    said = json.loads((found / "transfer.json").read_text())
    text = [
        "# A subset for 70 B parameters from a small model's statistics",
        f"`python -m tests.benchmarks.transfer_70b {' '.join(sys.argv[1:])}`",
        machine(),
        f"{said['trained']:,} parameters chosen, whole tensors; value {said['value']:.4g}, bound {said['bound']:.4g}. "
        f"{seconds:.0f} s, peak memory {peak:.1f} GiB, most of it Python and its libraries; no weights exist.",
        "The value is the small model's influence per element times the number of the large model's elements: it ranks "
        "choices, but does not predict the loss decrease of the large model.",
    ]
    report = RESULTS / "transfer-70b.md"
    report.write_text("\n\n".join(text) + "\n")
    print(report.read_text())


if __name__ == "__main__":
    main()

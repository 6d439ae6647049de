"""``adapeft compare`` in forks of one process instead of on Ray; see ``forks``.

``python -m tests.benchmarks.methods CONFIG methods=[…] budgets=[…] seeds=[…] learning_rates=[…]`` takes what
``adapeft compare`` takes, and goes on where either stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adapeft.config.experiments import load_comparison
from cluster.commands.compare.compare import check, compare
from cluster.commands.compare.report import write_report
from cluster.inspection.inspect import inspect
from tests.benchmarks.forks import run_in_fork


def main() -> None:
    path, *overrides = sys.argv[1:]
    comparison, config = load_comparison(Path(path), overrides)
    check(config, comparison, inspect)
    runs = compare(config, comparison, lambda line: print(line, flush=True), run_in_fork)
    print(write_report(Path(config.output), config, comparison, runs).read_text())


if __name__ == "__main__":
    main()

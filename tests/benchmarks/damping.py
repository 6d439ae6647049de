"""Statistics of elements with damped curvature, to test whether damping improves the choice.

``python -m tests.benchmarks.damping RUN LAMBDA OUTPUT`` adds λ times the mean curvature of all elements to the
curvature of each (Levenberg, 1944; Marquardt, 1963, with the mean as the scale) and writes statistics for
``select.statistics``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adapeft.measure.statistics import ElementShard
from adapeft.measure.storage import load_statistics, save_elements, save_groups
from adapeft.ranks import OneRank


def main(run: Path, damping: float, output: Path) -> None:
    """Write the statistics of ``run`` with damped curvature to ``output``."""
    statistics, key = load_statistics(run)
    curvatures = [shard.columns["curvature"] for shard in statistics.elements]
    total = sum(float(curvature.double().sum()) for curvature in curvatures)
    mean = total / sum(map(len, curvatures))
    damped = tuple(
        ElementShard(shard.slice, {**shard.columns, "curvature": curvature + damping * mean})
        for shard, curvature in zip(statistics.elements, curvatures, strict=True)
    )
    save_groups(output, statistics.groups, statistics.columns, key)
    save_elements(output, damped, OneRank())


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))

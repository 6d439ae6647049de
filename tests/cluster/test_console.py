"""What a terminal is shown."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from cluster.console import Terminal


def test_values_stand_beside_each_other_behind_the_longest_name():
    output = StringIO()
    Terminal(Console(file=output, width=60)).pairs({"pearson_spearman": "0.1 → 0.8", "merge": ("adapeft", "  --out")})
    assert output.getvalue().splitlines() == [
        "pearson_spearman 0.1 → 0.8",
        "merge            adapeft",
        "                   --out",
    ]

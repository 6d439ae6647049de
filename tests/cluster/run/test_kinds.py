"""Subsets with added modules, or parts of several kinds, through the command, Ray and DeepSpeed."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from adapeft.deltas.delta import Delta
from adapeft.subset.subset import Subset
from tests.cluster.run.test_pipeline import text_of
from tests.support.checkpoints import adapeft

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_choice_among_kinds(config, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    mixed = ["select.options=[tensor,lora]", "lora_ranks=[1,2]", "groups=row"]
    output = text_of(adapeft("run", config, *mixed, f"output={run}"))
    assert "by tensor, lora" in output
    subset = Subset.load(run / "subset.safetensors")
    kinds = {part.kind for part in subset.parts.values()}
    assert "lora" in kinds <= {"tensor", "lora"}
    options, groups = (pq.read_table(run / f"{name}.parquet") for name in ("options", "groups"))
    figures = {"slope", "curvature", "projections", "influence"}
    assert {"parameter", "rank", "count", "chosen"} | figures == set(options.column_names)
    rows = [row["chosen"] for row in groups.to_pylist() if row["index"] >= 0]
    vectors = sum(row["chosen"] for row in groups.to_pylist() if row["index"] < 0)
    whole = sum(row["chosen"] for row in options.to_pylist() if row["rank"] == 0)
    assert sum(options["chosen"].to_pylist()) + vectors == subset.count
    assert sum(rows) == whole, "a matrix trained whole trains all its rows"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert Delta.load(run / "delta.safetensors").count == subset.count

    shown = text_of(adapeft("show", run))
    assert "lora" in shown
    output = text_of(adapeft("select", config, *mixed, f"select.statistics={run}", "budget=5%", f"output={again}"))
    assert "starting" not in output
    assert 0 < Subset.load(again / "subset.safetensors").count < subset.count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_what_stands_beside_the_weights(config, tmp_path, method):
    run = tmp_path / "run"
    text_of(adapeft("run", config, f"method={method}", "groups=auto", f"output={run}"))
    metrics = json.loads((run / "metrics.json").read_text())
    # The loss need not be lower: so small a model with random weights may offer nothing that adapters can use.
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    delta = run / "delta.safetensors"
    said = text_of(adapeft("evaluate", config, f"method={method}", "groups=auto", f"output={run}"))
    assert f"{metrics['after']['accuracy']:.4f}" in said
    merged = adapeft("merge", delta, "--model", config.parent / "base", "--out", tmp_path / "merged")
    assert (merged.returncode == 0) == (method == "lora")
    if method == "adapter":
        assert "Delta.apply" in merged.stdout + merged.stderr

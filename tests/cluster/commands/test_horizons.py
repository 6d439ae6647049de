"""``adapeft horizons`` needs only the files of a run that measured along a probe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from adapeft.config.keys import measurement_key
from adapeft.config.load import load_config
from adapeft.measure.groups import build_groups
from adapeft.measure.storage import save_groups
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from tests.cluster.output.test_report import Page
from tests.support.browser import CHROMIUM, check_page
from tests.support.tiny import make_bert


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run that measured along a probe."""
    folder = tmp_path / "run"
    folder.mkdir()
    select = {"groups": "row", "budget": "20%", "probe_steps": 9, "probe_points": 3}
    data = {"train": "a.jsonl", "evaluation": "b.jsonl"}
    tree = {"model": {"name": "bert", "task": "sequence-classification"}, "data": data, "output": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "select": select}))
    groups = build_groups(make_bert(), "row")
    slopes = np.random.default_rng(0).uniform(0.1, 1, (groups.num_groups, 3))
    columns = {"slope": slopes, "curvature": np.zeros_like(slopes)}
    save_groups(folder, groups, columns, measurement_key(load_config(folder / "config.yaml")))
    Subset({}, choice=Choice(reach=0.5, budget=321)).save(folder / "subset.safetensors")
    return folder


def test_the_command(command, run):
    done = command("horizons", run)
    assert done.returncode == 0, done.stderr
    for word in ("at step 0", "at step 4", "at step 9", "uniformly", "randomly", "100.0%", "rank correlation"):
        assert word in done.stdout
    page = Page((run / "horizons.html").read_text(encoding="utf-8"))
    assert [attributes["id"] for attributes in page.all("figure")] == ["horizons"]
    assert (run / "pictures" / "horizons.png").stat().st_size > 5000
    assert {"at step 9", "uniformly", "100.0%"} <= set(page.texts)
    written = json.loads((run / "horizons.json").read_text())
    assert written["steps"] == [0, 4, 9]
    for name in ("captured", "overlap"):
        table = np.array(written[name])
        np.testing.assert_allclose(table.diagonal(), 1)
        assert table[0, 2] < 1
        assert f"{table[0, 2]:.1%}" in done.stdout
    assert command("horizons", run, "--budget", "1%").returncode == 0
    assert json.loads((run / "horizons.json").read_text())["budget"] < written["budget"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_horizons_on_a_narrow_screen(command, run, tmp_path, dark):
    assert command("horizons", run).returncode == 0
    check_page(run / "horizons.html", tmp_path, dark=dark, num_images=1)


def test_what_has_no_horizons(command, run, tmp_path):
    assert "no run with statistics" in command("horizons", tmp_path).stderr
    assert "select.budget = 900%: is more than all parameters" in command("horizons", run, "--budget", "900%").stderr
    assert "Give a number: --budget 321 is what this run took." in command("horizons", run, "--budget", "auto").stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["select"]["probe_steps"], config["select"]["probe_points"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert (
        "was measured at one point only. Run select into another output with select.probe_steps=N"
        in command("horizons", run).stderr
    )

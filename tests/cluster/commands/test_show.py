"""``adapeft show``: the figures of a run's report as tables."""

from __future__ import annotations

import json

import pytest

from adapeft.config.write import to_yaml
from adapeft.tasks.generation import Generation
from cluster.output.generations import save_generations
from tests.cluster.output.test_report import write_element_run, write_run


def line_of(text, start):
    """Return the words of the only line that starts with ``start``."""
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found.split()


def test_a_run(command, tmp_path):
    folder, config = write_run(tmp_path / "run", always=0)
    folder.config.write_text(to_yaml(config))
    save_generations(folder.generations_before, [Generation(3, "2+2?", "4", "five")])
    save_generations(folder.generations, [Generation(3, "2+2?", "4", "four")])
    status, shown, errors = command("show", folder.path)
    assert status == 0, errors
    # Two rows of four parameters in the embeddings, outside the layers, and one in layer 0.
    chosen, influence = shown.split("influence by role")
    assert line_of(chosen, "trained parameters by role")[-4:] == ["outside,", "layer", "0", "sum"]
    assert [line.split() for line in chosen.splitlines() if line.split()[-1:] == ["8"]] == [
        ["model.embed.weight", "█", "8"],
    ]
    assert ["mlp.weight", "▒", "4"] in [line.split() for line in chosen.splitlines()]
    # The slopes fall from 0.5 to 0.01 over 24 rows, eight of each parameter, and an influence is a tenth of its slope.
    lighter, lightest = line_of(influence, "mlp.weight")[1]
    assert lightest == "·" != lighter
    assert " outside, layers 0–1 " in influence
    assert line_of(influence, "model.embed.weight    0") == ["model.embed.weight", "0", "0.5", "0.167", "0.05"]
    (run_line,) = [line for line in shown.splitlines() if line.rstrip().endswith(("this run", "this run, knee"))]
    assert run_line.split()[:2] == ["6.000%", "12"]
    assert "knee" in shown
    evaluations = [line.split() for line in shown.splitlines() if "0.75" in line and "kept" in line]
    assert [(words[0], words[1], words[-2]) for words in evaluations] == [("10", "0.6000", "0.7500")]
    assert len([line for line in shown.splitlines() if "██" in line]) >= 3, "a bar for each evaluation"
    assert "0.3 predicted, summed over groups, 0.4 measured at the end" in " ".join(shown.split())
    assert "training 800.0 MiB of memory per worker" in shown
    memory = shown.split("estimated memory per worker")[1]
    assert [line_of(memory, start)[-2:] for start in ("weights", "process")] == [["100.0", "MiB"], ["700.0", "MiB"]]
    assert "optimizer" not in memory
    assert line_of(memory, "total")[-3:] == ["≤", "800.0", "MiB"]
    assert line_of(memory, "measured peak")[-2:] == ["800.0", "MiB"]
    assert line_of(shown, "before")[1:] == ["five"]
    assert line_of(shown, "after")[1:] == ["four"]


def test_a_run_of_elements(command, tmp_path):
    folder, config, chosen, total = write_element_run(tmp_path / "run")
    folder.config.write_text(to_yaml(config))
    status, shown, errors = command("show", folder.path)
    assert status == 0, errors
    head, rest = shown.split("chosen parameters by role")
    map_of_chosen, rest = rest.split("influence by role")
    influence, rest = rest.split("most influence")
    slopes = rest.split("budget")[0]
    assert line_of(head, "trained") == ["trained", "as", "parameters", "share"]
    assert line_of(head, "drawn")[1] == str(20 - chosen.count)
    roles = [line.split() for line in map_of_chosen.splitlines()]
    assert sum(int(words[-1]) for words in roles if words and words[0].endswith("weight")) == chosen.count
    shares = [float(word.removesuffix("%")) for word in influence.split() if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert f"their sum would be a loss decrease of {total:,.4g}, but all together promise" in " ".join(
        influence.split()
    )
    assert slopes.split("\n")[0].split() == ["slope", "±", "error", "influence"]
    name, slope, error, _ = line_of(slopes, "model.embed.weight")
    assert (name, float(slope) / float(error)) == ("model.embed.weight", pytest.approx(4, rel=0.02))


def test_a_run_that_has_not_trained_or_measured(command, tmp_path):
    folder, config = write_run(tmp_path / "run", measured=False, method="random")
    folder.config.write_text(to_yaml(config))
    folder.metrics.write_text(json.dumps({"choice": {}, "seconds": {}}))
    status, shown, errors = command("show", folder.path)
    assert status == 0, errors
    assert "trained parameters by role" in shown
    assert "influence by role" not in shown
    assert "not trained yet" in shown


def test_a_run_scored_by_its_loss_names_it_once(command, tmp_path):
    folder, config = write_run(tmp_path / "run")
    folder.config.write_text(to_yaml(config))
    metrics = json.loads(folder.metrics.read_text())
    folder.metrics.write_text(json.dumps({**metrics, "metric": "loss"}))
    status, shown, errors = command("show", folder.path)
    assert status == 0, errors
    assert [line.split() for line in shown.splitlines() if " → " in line] == [["loss", "1.1000", "→", "0.6000"]]

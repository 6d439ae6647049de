"""Comparing methods: runs, reuse of finished runs, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from matplotlib.colors import to_rgba
from scipy import stats

from adapeft.config.experiments import Comparison, Contender, load_comparison
from adapeft.config.load import load_config, parse_section
from adapeft.data.content import model_hash
from adapeft.data.sources import load_rows
from adapeft.errors import AdapeftError
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from cluster.commands.compare import compare as comparing
from cluster.commands.compare.compare import check, finished
from cluster.commands.compare.events import evaluations, seconds_of_stages
from cluster.commands.compare.examples import held_out, perturbed
from cluster.commands.compare.machines.apart import run_apart
from cluster.commands.compare.machines.local import Machines
from cluster.commands.compare.output import pictures
from cluster.commands.compare.output.report import Report, against
from cluster.commands.compare.output.row import Row, rows_of
from cluster.commands.compare.output.table import cells_of, steps_to
from cluster.commands.compare.output.table import table as in_markdown
from cluster.commands.compare.run import with_values
from cluster.inspection.inspect import inspect
from cluster.output.contents import contents_of
from cluster.output.folder import RunFolder
from cluster.run.climb import climb
from tests.cluster.output.test_report import Page
from tests.support.browser import CHROMIUM, check_page
from tests.support.checkpoints import adapeft, write_bert, write_colours, write_config


@pytest.fixture
def config(tmp_path):
    return load_config(
        write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path)),
        [f"output={tmp_path / 'out'}"],
    )


class Runner:
    """Replaces the runs: scores depend on method, budget, seed and learning rate, and sam fails with seed 1."""

    def __init__(self) -> None:
        self.configs = []

    def __call__(self, config):
        self.configs.append(config)
        select, rate = config.select, config.train.learning_rate
        if select.method == "sam" and config.seed == 1:
            return None, "out of memory"
        score = {"adapeft": 0.7, "sam": 0.6, "random": 0.5, "full": 0.8, "adapter": 0.6, "mixout": 0.6}[
            select.method
        ] - abs(np.log10(rate / 1e-2)) / 10
        score += 0.01 * config.seed + (0.02 if str(select.budget) == "40%" else 0)
        last = {"accuracy": score, "loss": rate}
        early = {"accuracy": score - (0.05 if select.method == "adapeft" else 0.15), "loss": 9.0}
        return {
            "metric": "accuracy",
            "after": {"accuracy": 1.0, "loss": 0.0},
            "last": last,
            "history": [{"step": 10, **early}, {"step": 20, **last}],
            "trainable_parameters": 100 if str(select.budget) == "20%" else 200,
            "delta_bytes": 800,
            "peak_memory_bytes": 2**30,
            "seconds": {"select": 1.0, "train": 2.0},
        }, None


def settings(*overrides):
    return parse_section(Comparison, overrides)[0]


def compare(config, comparison, note, run=None, show=lambda runs: None):
    """Compare on this machine, with ``run`` in place of the command."""
    machines = Machines(comparison.parallel or 1)
    if run is not None:
        machines.run = run
    return comparing.compare(config, comparison, note, machines, show)


def table(rows, metric, reference=None):
    return in_markdown(*cells_of(rows, metric, True, reference))


def write_report(config, comparison, runs):
    report = Report(config, comparison)
    report.write(runs)
    return report.path


def test_every_method_budget_and_seed_is_run(config):
    runner, said = Runner(), []
    comparison = settings("methods=[adapeft:row,full,random]", "seeds=[0,1]", "budgets=[20%,40%]", "parallel=2")
    runs = compare(config, comparison, said.append, runner)
    assert finished(runs)
    found = {(str(run.contender), str(run.budget), run.seed) for run in runs}
    budgets = ("20%", "40%")
    assert found == {
        *((method, budget, seed) for method in ("adapeft:row", "random") for budget in budgets for seed in (0, 1)),
        *(("full", "20%", seed) for seed in (0, 1)),
    }, "a method without a budget is run once a seed"
    assert len({config.output for config in runner.configs}) == len(runs) == len(said) == 10
    for settings_of in runner.configs:
        first = str(settings_of.select.budget) == "20%"
        assert (settings_of.select.statistics is None) == first, "the second budget chooses from the first's statistics"
        if not first:
            assert settings_of.select.statistics == settings_of.output.replace("40-percent", "20-percent")


def test_the_learning_rate_is_swept_on_a_part_of_the_training_data(config):
    runner = Runner()
    comparison = settings("methods=[random]", "seeds=[3,4]", "learning_rates=[1e-3,1e-2,1e-1]", "tune_fraction=0.25")
    runs = compare(config, comparison, lambda text: None, runner)
    sweep, final = runner.configs[:3], runner.configs[3:]
    assert [one.train.learning_rate for one in final] == [1e-2, 1e-2] == [run.learning_rate for run in runs]
    assert {one.seed for one in sweep} == {3}
    original = Path(config.data.train).read_text(encoding="utf-8").splitlines()
    held_out, rest = (load_rows(getattr(sweep[0].data, key), "data.train").to_list() for key in ("evaluation", "train"))
    assert len(held_out) == round(len(original) * 0.25)
    assert sorted(held_out + rest, key=str) == sorted(map(json.loads, original), key=str)
    assert {one.data.evaluation for one in final} == {config.data.evaluation}
    assert {one.data.train for one in final} == {config.data.train}


def test_each_run_finds_its_own_learning_rate(config):
    runner = Runner()

    def run(settings):
        assert settings.train.learning_rate == "auto"
        found = 1e-2 if settings.seed else 3e-3
        metrics, failure = runner(with_values(settings, "train", learning_rate=found))
        return (metrics and {**metrics, "learning_rate": found}), failure

    searching = with_values(config, "train", learning_rate="auto")
    runs = compare(searching, settings("methods=[random,sam]", "seeds=[0,1]"), lambda text: None, run)
    assert [one.learning_rate for one in runs[:3]] == [3e-3, 3e-3, 1e-2]
    assert np.isnan(runs[3].learning_rate), "it failed before it found one"
    rows = rows_of(runs)
    assert [row.learning_rates for row in rows] == [(3e-3, 1e-2), (3e-3,)]
    assert "| 0.003, 0.01 |" in table(rows, "accuracy")


def test_every_budget_has_a_learning_rate_of_its_own(config):
    def run(settings):
        """Make the best rate larger for the smaller budget; all scores are equal, so the loss decides."""
        best = {"20%": 1e-1, "40%": 1e-3}[str(settings.select.budget)]
        distance = abs(np.log10(settings.train.learning_rate / best))
        configs.append(settings)
        last = {"accuracy": 0.5, "loss": float(distance)}
        return {"metric": "accuracy", "last": last, "history": []}, None

    configs = []
    comparison = settings("methods=[adapeft]", "seeds=[0]", "budgets=[20%,40%]", "learning_rates=[1e-3,1e-2,1e-1]")
    runs = compare(config, comparison, lambda text: None, run)
    assert {str(one.budget): one.learning_rate for one in runs} == {"20%": 1e-1, "40%": 1e-3}
    measured = [one.select.statistics is None for one in configs]
    assert measured == [True, *[False] * 5, True, False], "a sweep measures once, and so does a seed"


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("peak", range(7))
@pytest.mark.parametrize("width", [1, 2])
def test_a_climb_ends_on_the_peak_and_looks_no_farther_than_needed(start, peak, width):
    asked = []

    def score(index: int) -> int:
        asked.append(index)
        return -abs(index - peak)

    assert climb(score, start, 7, width=width) == peak
    way = range(min(start - 1, peak - width), max(start + 1, peak + width) + 1)
    assert sorted(asked) == [index for index in way if 0 <= index < 7]


@pytest.mark.parametrize(
    ("scores", "asked"),
    [
        ([-9, -5, -3, -2, -5, -9, -9], {1, 2, 3, 4}),  # 4 is far below 3
        ([-9, -5, -3, -2, -3, -9, -9], {1, 2, 3, 4, 5}),
        ([-9, -9, -9, -3, -2, -3, -3], {2, 3, 4, 5, 6}),  # far ones below the peak end nothing
    ],
)
def test_a_climb_looks_for_nothing_above_a_score_far_below_the_best(scores, asked):
    tried = []

    def score(index: int) -> int:
        tried.append(index)
        return scores[index]

    assert climb(score, 3, 7, lambda low, best: low < 2 * best) == scores.index(-2)
    assert sorted(tried) == sorted(asked)


@pytest.mark.parametrize("start", range(7))
def test_a_climb_from_far_above_goes_down(start):
    """Where all begin too high, what is far below the best does not keep it there."""
    scores = [-3, -2, -3, -9, -99, -999, -float("inf")]
    assert climb(scores.__getitem__, start, 7, lambda low, best: low < 2 * best) == 1


def test_a_run_that_came_apart_does_not_end_a_climb(config):
    def run(settings):
        rate = settings.train.learning_rate
        last = {"accuracy": float("nan") if rate > 1e-3 else 0.5 + rate, "loss": float("nan") if rate > 1e-3 else 1.0}
        return {"metric": "accuracy", "last": last, "history": []}, None

    comparison = settings("methods=[random]", "seeds=[0]", "learning_rates=[1e-4,1e-3,1e-2,1e-1,1]")
    runs = compare(config, comparison, lambda text: None, run)
    assert [one.learning_rate for one in runs] == [1e-3]


def diverging_above(most: float):
    def run(settings):
        if settings.train.learning_rate > most:
            return None, "error training diverged at step 3 of 8: the loss is nan. (full log: seed-0.log)"
        return Runner()(settings)

    return run


def test_a_rate_at_which_training_diverges_is_the_worst(config):
    """It is tried first, does not fail the other rates, does not win and does not end the climb."""
    comparison = settings("methods=[random]", "seeds=[0]", "learning_rates=[1e-4,1e-3,1e-2]")
    said = []
    runs = compare(config, comparison, said.append, diverging_above(1e-4))
    assert [(one.learning_rate, one.failure) for one in runs] == [(1e-4, None)]
    assert "training diverged at step 3" in said[0]


def test_where_training_diverges_at_every_rate_the_report_says_so(config):
    comparison = settings("methods=[random]", "seeds=[0]", "learning_rates=[1e-3,1e-2]")
    (run,) = compare(config, comparison, print, diverging_above(0))
    assert run.failure.startswith("sweep: error training diverged")
    assert run.has_diverged
    assert "| diverged |" in table(rows_of([run]), "accuracy").splitlines()[-1]


def test_a_seed_that_diverges_is_counted_and_never_reaches_a_score(config):
    def run(settings):
        if settings.select.method == "adapeft" and settings.seed == 1:
            return None, "error training diverged at step 3 of 8: the loss is nan."
        return Runner()(settings)

    comparison = settings("methods=[adapeft,random]", "seeds=[0,1,2]")
    rows = rows_of(compare(config, comparison, print, run))
    row, random = rows
    assert (len(row.scores), row.num_diverged) == (2, 1)
    assert "without 1 of 3 seeds, which diverged" in table([row], "accuracy")
    assert steps_to(row, random, higher_is_better=True) == {0: 10, 2: 10}
    assert "| never on 1 of 3 seeds |" in table(rows, "accuracy", comparison.referred).splitlines()[2]


def test_a_budget_that_excludes_a_method_is_tried_at_one_rate(config):
    def run(settings):
        configs.append(settings)
        if str(settings.select.budget) == "20%":
            return None, "error select.budget = 20%: no rank is so small. (full log: seed-0.log)"
        return Runner()(settings)

    configs = []
    comparison = settings("methods=[adapeft]", "seeds=[0,1]", "budgets=[20%,40%]", "learning_rates=[1e-3,1e-2,1e-1]")
    runs = compare(config, comparison, lambda text: None, run)
    assert [one.failure is None for one in runs] == [False, True, False, True]
    assert [str(one.select.budget) for one in configs[:4]] == ["20%", *["40%"] * 3]


def test_a_refusal_at_one_rate_does_not_end_a_climb(config):
    def run(settings):
        if settings.train.learning_rate == 1e-1:
            return None, "error output = out holds another run"
        return Runner()(settings)

    comparison = settings("methods=[adapeft]", "seeds=[0]", "learning_rates=[1e-3,3e-3,5e-3,1e-2,1e-1]")
    assert [one.learning_rate for one in compare(config, comparison, lambda text: None, run)] == [1e-2]


def test_a_sweep_without_a_score_is_no_learning_rate(config):
    """All runs of the sweep fail, as its folders hold runs on other examples; the middle rate must not win."""

    def run(settings):
        return run_apart(settings, finished_run) if "sweep" in settings.output else Runner()(settings)

    given = ["methods=[random]", "seeds=[0,1]", "learning_rates=[1e-3,1e-2,1e-1]"]
    assert finished(compare(config, settings(*given), lambda text: None, run))
    said = []
    runs = compare(config, settings(*given, "tune_fraction=0.3"), said.append, run)
    assert all("sweep: error" in one.failure and "holds another run" in one.failure for one in runs)
    assert [line.partition(":")[0] for line in said] == ["sweep 1", "run 1/2", "run 2/2"]

    def apart(settings):
        return {"metric": "accuracy", "last": {"accuracy": 0.5, "loss": float("nan")}, "history": []}, None

    config = config.model_copy(update={"output": f"{config.output}-apart"})
    assert [one.failure for one in compare(config, settings(*given), print, apart)] == [
        "sweep: accuracy or loss was not finite"
    ] * 2


def test_a_damaged_run_loses_nothing_of_the_rest(config):
    comparison = settings("methods=[adapeft,random]", "seeds=[0]")
    runs = compare(config, comparison, print, lambda one: run_apart(one, finished_run))
    (runs[0].folder / "config.yaml").write_text("select: [")
    again = compare(config, comparison, print, lambda one: run_apart(one, finished_run))
    assert "config.yaml" in again[0].failure
    assert again[1].metrics == runs[1].metrics


def test_a_dip_does_not_end_a_climb():
    assert climb([0.1, 0.6, 0.4, 0.5, 0.2].__getitem__, 3, 5) == 1


def test_a_climb_ends_where_everything_fails():
    assert climb(lambda index: (-np.inf, -np.inf), 1, 3) == 1


def test_a_sweep_begins_where_the_last_budget_ended(config):
    runner, said = Runner(), []
    rates = [1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    comparison = settings("methods=[random]", "seeds=[0]", "budgets=[20%,40%]", f"learning_rates={rates[::-1]}")
    runs = compare(config, comparison, said.append, runner)
    assert [run.learning_rate for run in runs] == [1e-2, 1e-2]
    first, second = [3e-3, 1e-3, 1e-2, 3e-2, 1e-1], [1e-2, 3e-3, 3e-2, 1e-3, 1e-1]
    assert [one.train.learning_rate for one in runner.configs[:-2]] == first + second
    assert [line.partition(":")[0] for line in said] == [*(f"sweep {n}" for n in range(1, 11)), "run 1/2", "run 2/2"]


def finished_run(settings, log):
    """Write the files of a finished run, in place of a run in another process."""
    config = load_config(settings)
    folder = RunFolder.of(config)
    folder.claim(config, contents_of(config, describe(TASKS[config.model.task], config.data)))
    scores = {"accuracy": 0.5, "loss": 1.0}
    content = {"metric": "accuracy", "choice": {}, "seconds": {}, "history": []}
    sizes = (
        "total_parameters",
        "trainable_parameters",
        "always_trained_parameters",
        "delta_bytes",
        "peak_memory_bytes",
    )
    content |= {**dict.fromkeys(("before", "after", "last"), scores), **dict.fromkeys(sizes, 1)}
    folder.metrics.write_text(json.dumps(content))
    folder.subset.touch()
    return 0


def never(settings, log):
    pytest.fail("it is finished")


def test_a_finished_run_counts_only_for_its_own_config(config):
    metrics, _ = run_apart(config, finished_run)
    assert run_apart(config, never) == (metrics, None)
    other = with_values(config, "train", epochs=9)
    metrics, failure = run_apart(other, never)
    assert metrics is None
    assert "holds another run" in failure
    assert "train.epochs: 9.0 here" in failure


def test_a_comparison_that_finds_another_learning_rate_runs_again(config):
    first, second = Runner(), Runner()
    for runner, rates in ((first, "[1e-4,1e-3]"), (second, "[1e-4,1e-3,1e-2]")):
        compare(config, settings("methods=[random]", "seeds=[0]", f"learning_rates={rates}"), lambda text: None, runner)
    last = [runner.configs[-1] for runner in (first, second)]
    assert [one.train.learning_rate for one in last] == [1e-3, 1e-2]
    assert len({one.output for one in last}) == 2
    again = {one.output: one for one in first.configs[:-1] if one.output in {two.output for two in second.configs}}
    assert {one.train.learning_rate for one in again.values()} == {1e-4, 1e-3}, "what was swept is not swept again"


def test_an_extended_comparison_takes_up_what_was_begun(config):
    outcomes = []
    for budgets in ("[30%]", "[20%,30%,40%]"):
        comparison = settings("methods=[adapeft]", "seeds=[0]", f"budgets={budgets}")
        outcomes.append(compare(config, comparison, lambda text: None, lambda one: run_apart(one, finished_run)))
    assert all(map(finished, outcomes))
    measured = {str(run.budget): load_config(run.folder / "config.yaml").select.statistics for run in outcomes[1]}
    assert measured == {"20%": None, "30%": None, "40%": str(outcomes[1][0].folder)}


def test_parts_of_the_data_are_files_of_their_own(config, tmp_path):
    parts = [held_out(config, fraction, tmp_path / "parts").data for fraction in (0.1, 0.2, 0.1)]
    assert parts[0] == parts[2] != parts[1]
    other = held_out(config.model_copy(update={"seed": 1}), 0.1, tmp_path / "parts").data
    assert other.train != parts[0].train


def test_perturbing_leaves_out_other_examples_for_each_seed(config):
    runner = Runner()
    compare(config, settings("methods=[random,full]", "seeds=[0,1]", "perturb=0.1"), lambda text: None, runner)
    by_seed = {one.seed: load_rows(one.data.train, "data.train").to_list() for one in runner.configs}
    assert by_seed[0] != by_seed[1]
    original = Path(config.data.train).read_text(encoding="utf-8").splitlines()
    for rows in by_seed.values():
        assert len(rows) == len(original) - round(0.1 * len(original))


def test_parts_of_the_data_keep_the_names_of_classes(config, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["red", "blue"])})
    rows = Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}, features=features)
    rows.to_parquet(tmp_path / "named.parquet")
    named = with_values(config, "data", train=str(tmp_path / "named.parquet"))
    for part in (held_out(named, 0.25, tmp_path / "parts"), perturbed(named, 0.25, 0, tmp_path / "parts")):
        assert load_rows(part.data.train, "data.train").features["label"].names == ["red", "blue"]


def test_a_finished_run_of_data_that_has_changed_is_refused(config):
    metrics, _ = run_apart(config, finished_run)
    path = Path(config.data.train)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[1:] + lines[:1]))
    _, failure = run_apart(config, never)
    assert f"data.train = {path}: content" in failure
    path.write_text("".join(lines))
    assert run_apart(config, never) == (metrics, None)


def test_data_and_base_are_hashed_once_for_all_finished_runs(config, monkeypatch):
    comparison = settings("methods=[random,adapeft]", "seeds=[0,1]", "budgets=[20%,40%]")
    monkeypatch.setattr(Machines, "execute", lambda self, command, settings, log: finished_run(settings, log))
    compare(config, comparison, print)
    read = []

    def counted(name, revision):
        read.append(name)
        return model_hash(name, revision)

    monkeypatch.setattr("cluster.output.contents.model_hash", counted)
    monkeypatch.setattr(Machines, "execute", lambda *arguments: never(*arguments[2:]))
    assert finished(compare(config, comparison, print))
    assert read == [config.model.name]
    path = Path(config.data.evaluation)
    path.write_text(path.read_text(encoding="utf-8").replace("red", "blue"))
    changed = compare(config, comparison, print)
    assert all(f"data.evaluation = {path}: content" in run.failure for run in changed), "another call reads anew"


def test_a_key_of_one_method_is_no_other_ones(config):
    config = with_values(config, "select", placement="houlsby", method="adapter")
    runner = Runner()
    comparison = settings("methods=[adapter,random:row,adapeft:row+lora,adapeft:paper]", "seeds=[0]")
    compare(config, comparison, lambda text: None, runner)
    adapter, random, mixed, paper = (one.select for one in runner.configs)
    assert adapter.placement == "houlsby"
    assert not any("placement" in one.model_dump() for one in (random, mixed, paper))
    assert mixed.options == ("row", "lora")
    assert random.granularity == "row"
    assert (paper.granularity, paper.curvature, paper.solver) == ("role", "parabola", "greedy")
    assert paper.reach == float("inf")
    assert paper.probe_steps == 20, "the paper accumulates influence over a short probe"
    assert len({one.output for one in runner.configs}) == 4


def test_keys_of_a_probe_mean_nothing_without_each_other(config):
    """Two probe steps are too few for the default number of probe points."""
    config, runner = with_values(config, "select", probe_steps=2, probe_points=2), Runner()
    compare(config, settings("methods=[random,adapeft:tensor]", "seeds=[0]"), lambda text: None, runner)
    random, chosen = (one.select for one in runner.configs)
    assert "probe_steps" not in random.model_dump()
    assert (chosen.probe_steps, chosen.probe_points) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"groups": "row"}, "adapeft:row or adapeft:element"),
        ({"options": ("row", "lora")}, "adapeft:row[+]lora or adapeft:element"),
    ],
)
def test_a_method_that_would_not_choose_as_the_config_says_is_refused(config, given, said):
    config = with_values(config, "select", **given)
    with pytest.raises(AdapeftError, match=f"methods: adapeft chooses by element, .*: {said}"):
        check(config, settings("methods=[adapeft,random]"), inspect)
    check(config, settings("methods=[adapeft:row,adapeft:element,random]"), inspect)
    check(with_values(config, "select", groups="element", options=()), settings("methods=[adapeft,random]"), inspect)


def test_a_key_need_fit_only_one_of_the_methods(tmp_path):
    """The method of the config need not be one of them, and keys are not checked against it."""
    path = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    given = ["methods=[random:row,sam]", "select.scope=tensor", "seeds=[0]", f"output={tmp_path / 'out'}"]
    comparison, loaded = load_comparison(path, given)
    runner = Runner()
    compare(loaded, comparison, lambda text: None, runner)
    random, sam = sorted((one.select for one in runner.configs), key=lambda select: select.method)
    assert (random.method, sam.method, sam.scope) == ("random", "sam", "tensor")
    with pytest.raises(AdapeftError, match="adapeft by row chooses none by value; leave scope out"):
        load_comparison(path, ["methods=[random:row]", "groups=row", "select.scope=tensor"])
    with pytest.raises(AdapeftError, match=r"method = smm: .*Did you mean 'sam'"):
        load_comparison(path, ["methods=[sam]", "select.method=smm"])


@pytest.mark.parametrize("select", ["", "select:\n"])
def test_a_conflict_of_other_keys_needs_no_select(tmp_path, select):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name: a, task: causal-lm}}\ndata: {{train: b, evaluation: b}}\noutput: c\n{select}")
    with pytest.raises(AdapeftError, match=r"cluster\.offload = cpu: needs zero_stage = 3"):
        load_comparison(path, ["cluster.offload=cpu", "cluster.zero_stage=1"])


def test_keys_of_several_methods_reach_each_its_own(tmp_path):
    path = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    keys = [
        "select.placement=houlsby",
        "select.direction=gradient",
        "select.rule={probability: 0.5}",
        "select.budget=9%",
    ]
    given = [*keys, "methods=[adapter,adapeft:tensor,mixout]", "seeds=[0]", f"output={tmp_path / 'out'}"]
    comparison, loaded = load_comparison(path, given)
    runner = Runner()
    compare(loaded, comparison, lambda text: None, runner)
    adapter, adapeft, mixout = (one.select.own() for one in runner.configs)
    assert adapter == {"placement": "houlsby"}
    assert (adapeft["direction"], adapeft["shrinkage"]) == ("gradient", True)
    assert mixout == {"probability": 0.5}
    with pytest.raises(AdapeftError, match=r"select\.placement = houlsby: is an option of method adapter"):
        load_comparison(path, [*keys, "methods=[adapeft:tensor,mixout]"])
    with pytest.raises(AdapeftError, match="bottleneck: unknown key"):
        load_comparison(path, [*given, "select.bottleneck=3"])


def test_one_failure_loses_nothing_of_the_rest(config):
    runs = compare(config, settings("methods=[adapeft,sam,random]"), lambda text: None, Runner())
    assert not finished(runs)
    report = write_report(config, settings(), runs)
    text = report.read_text(encoding="utf-8")
    assert "| adapeft | 0.5% | 0.6401 ± 0.0100 |" in text
    assert "sam at 0.5% failed (1 runs): out of memory" in text
    assert "sam against random at 0.5%: 0.1 better on every seed" in text
    assert (report.parent / "scores.png").stat().st_size > 5000
    assert len(json.loads((report.parent / "comparison.json").read_text(encoding="utf-8"))["runs"]) == 9


def test_the_page_has_the_table_and_every_picture(config):
    """Scores against parameters and bytes, the spread over the seeds, and the sweep of the learning rates."""
    comparison = settings("methods=[adapeft,sam,random]", "seeds=[0,1]", "learning_rates=[1e-3,1e-2,1e-1]")
    runs = compare(config, comparison, lambda text: None, Runner())
    folder = write_report(config, comparison, runs).parent
    page = Page((folder / "comparison.html").read_text(encoding="utf-8"))
    names = [attributes["id"] for attributes in page.all("figure")]
    assert names == ["scores", "bytes", "spread", "rates"]
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in names)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert len(page.all("tr")) == 1 + len({run.contender for run in runs})
    shown = " ".join(page.texts)
    for expected in ("sam at 0.5% failed (1 runs): out of memory", "against random at 0.5%", "accuracy, mean ± std"):
        assert expected in shown
    content = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    swept = next(run["swept"] for run in content["runs"] if run["method"] == "adapeft")
    assert [point["learning_rate"] for point in swept] == [1e-3, 1e-2, 1e-1]
    assert [point["accuracy"] for point in swept] == pytest.approx([0.6, 0.7, 0.6])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_comparison_on_a_narrow_screen(config, tmp_path, dark):
    comparison = settings("methods=[adapeft,sam,random]", "seeds=[0,1]", "learning_rates=[1e-3,1e-2,1e-1]")
    runs = compare(config, comparison, lambda text: None, Runner())
    folder = write_report(config, comparison, runs).parent
    check_page(folder / "comparison.html", tmp_path, dark=dark, num_images=4)


def test_what_was_not_swept_has_no_rates_and_one_seed_no_spread(config):
    runs = compare(config, settings("methods=[random]", "seeds=[0]"), lambda text: None, Runner())
    assert [one.name for one in pictures.pictures_of(rows_of(runs), "accuracy")] == ["scores", "bytes"]
    assert pictures.pictures_of([], "accuracy") == []


def test_a_baseline_is_of_the_same_granularity(config):
    """Granularities may be defaults: all of these choose by element."""
    comparison = settings("methods=[random:row,random,adapeft:row,adapeft,sam]", "seeds=[0,2]")
    text = write_report(config, comparison, compare(config, comparison, print, Runner())).read_text(encoding="utf-8")
    pairs = (("adapeft:row", "random:row"), ("adapeft", "random"), ("sam", "random"))
    for method, baseline in pairs:
        assert f"- {method} against {baseline} at 0.5%:" in text
    assert (Path(config.output) / "spread.png").stat().st_size > 5000


def row(method, budget, scores, curves, **more):
    """Return a row with seconds 1 of choosing and 4 of training, unless ``more`` has others."""
    seconds = {"select_seconds": 1.0, "train_seconds": 4.0, "learning_rates": (1e-3,), "failures": ()}
    sizes = {"trained": 100.0, "delta_bytes": 4096.0, "peak_bytes": 2.0**20}
    return Row(method, "row", budget, scores, curves, **(sizes | seconds | more))


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_steps_to_a_score_are_counted_to_the_references_last_with_the_same_seed(higher_is_better):
    sign = 1 if higher_is_better else -1
    scores = {0: 0.6, 1: 0.7}
    lora = row("lora", "1%", scores, {0: {10: 0.5, 20: 0.6}, 1: {10: 0.8, 20: 0.7}})
    other = row("sam", "1%", {0: 0.7, 1: 0.7}, {0: {5: 0.59, 10: 0.6, 20: 0.7}, 1: {5: 0.7, 10: 0.7, 20: 0.69}})
    slow = row("magnitude", "1%", {0: 0.6, 1: 0.4}, {0: {10: 0.1, 20: 0.6}, 1: {10: 0.3, 20: 0.4}})
    free = row("full", "", {0: 0.1}, {0: {10: 0.2, 20: 0.1}})
    rows = [lora, other, slow, free]
    for one in rows:
        one.scores.update({seed: sign * score for seed, score in one.scores.items()})
        one.curves.update({seed: {at: sign * score for at, score in c.items()} for seed, c in one.curves.items()})
    heads, cells = cells_of(rows, "accuracy", higher_is_better, Contender.parse("lora"))
    column = heads.index("steps to lora's score")
    assert [line[column] for line in cells] == ["15", "8", "never on 1 of 2 seeds", "never"], "8: of 10 and 5"
    to_full = cells_of(rows, "accuracy", higher_is_better, Contender.parse("full"))[1]
    assert [line[column] for line in to_full] == ["10", "5", "10", "10"], "full has no budget"
    two = [*rows, row("lora", "2%", {0: 0.1}, {0: {10: 0.1}})]
    again = cells_of(two, "accuracy", higher_is_better, Contender.parse("lora"))[1]
    assert [line[column] for line in again] == ["15", "8", "never on 1 of 2 seeds", "–", "10"], "which of full's?"


@pytest.mark.parametrize(
    ("given", "referred"),
    [
        (["methods=[random,full,lora]"], "lora"),
        (["methods=[random,full,sam]"], "full"),
        (["methods=[sam,random:row]"], "random:row"),
        (["methods=[sam,adapeft]"], None),
        (["methods=[lora,sam]", "reference=sam"], "sam"),
    ],
)
def test_the_reference_is_that_of_the_config_or_a_usual_one(given, referred):
    found = settings(*given).referred
    assert (found and str(found)) == referred
    heads, _ = cells_of([], "accuracy", True, found)
    assert (f"steps to {referred}'s score" in heads) == (referred is not None)


def test_the_total_cost_counts_the_runs_of_the_sweep(config):
    """Every run of the runner takes 1 s to choose and 2 s to train; the sweep tries three rates."""
    comparison = settings("methods=[random]", "seeds=[0,1]", "learning_rates=[1e-3,1e-2,1e-1]")
    (row,) = rows_of(compare(config, comparison, print, Runner()))
    assert (row.select_seconds, row.search_seconds, row.train_seconds, row.total_seconds) == (1, 9, 2, 12)
    heads, (cells,) = cells_of([row], "accuracy", True, None)
    costs = dict(zip(heads, cells, strict=True))
    assert [costs[name] for name in ("delta KiB", "choose s", "search s", "train s", "total s")] == [
        *("1", "1", "9", "2", "12")
    ]


def test_the_total_cost_counts_what_a_run_has_searched_itself(config):
    def run(settings):
        metrics, _ = Runner()(settings)
        return {**metrics, "seconds": {"select": 1.0, "search": 5.0 + 2 * settings.seed, "train": 2.0}}, None

    (row,) = rows_of(compare(config, settings("methods=[random]", "seeds=[0,1]"), print, run))
    assert (row.search_seconds, row.total_seconds) == (6, 9)


def test_the_cost_of_an_unfinished_run_is_that_of_its_stages(tmp_path):
    """1 s of measuring, 3 of training until it was killed, and 2 more of an attempt that diverged an hour later."""
    events = [
        *(("00:00:00.000", "started"), ("00:00:01.000", "ended"), ("00:00:09.000", "started")),
        *(("00:00:10.500", "evaluated"), ("00:00:12.000", "training"), ("01:00:00.000", "started")),
        *(("01:00:01.500", "evaluated"), ("01:00:02.000", "failed")),
    ]
    path = tmp_path / "events.jsonl"
    scores = {"metric": "accuracy", "accuracy": 0.5, "loss": "inf"}
    lines = [
        json.dumps({"time": f"2026-01-01T{at}+00:00", "message": said, "at": 10 + number, **scores})
        for number, (at, said) in enumerate(events)
    ]
    path.write_text("\n".join([*lines, '{"time": "2026-01-01T09', ""])[:-1])
    assert seconds_of_stages(path) == pytest.approx(6)
    assert evaluations(path) == {at: {"accuracy": 0.5, "loss": np.inf} for at in (13, 16)}
    assert seconds_of_stages(tmp_path / "none") == 0


def test_the_report_shows_what_has_ended_after_every_run(config, monkeypatch):
    monkeypatch.setattr("cluster.commands.compare.output.report.pictures_of", lambda *arguments: [])
    comparison, shown = settings("methods=[adapeft,random]", "seeds=[0,1]"), []
    report = Report(config, comparison)

    def show(runs):
        report.write(runs)
        shown.append(report.path.read_text(encoding="utf-8"))

    runs = compare(config, comparison, print, Runner(), show)
    assert [text.count("\n| adapeft |") for text in shown] == [1, 1, 1, 1]
    assert [f"{number} of 4 runs so far" in text for number, text in enumerate(shown, 1)] == [True, True, True, False]
    assert ["| random |" in text for text in shown] == [False, True, True, True]
    assert "0.630, 0.640" in shown[2]
    content = json.loads(report.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [one["folder"] for one in content["runs"]] == [str(run.folder) for run in runs]


def test_the_paired_tests_are_those_of_scipy(config):
    rows = {row.method: row for row in rows_of(compare(config, settings("methods=[adapeft,random]"), print, Runner()))}
    row, baseline = rows["adapeft"], rows["random"]
    row.scores.update({0: 0.7, 1: 0.71, 2: 0.66})
    said = against(row, baseline, higher_is_better=True)
    differences = [row.scores[seed] - baseline.scores[seed] for seed in range(3)]
    assert f"paired t-test p = {stats.ttest_1samp(differences, 0).pvalue:.2g}" in said
    assert "exact sign-flip p = 0.25, 3 seeds" in said
    assert "worse" in against(baseline, row, higher_is_better=True)
    assert "better" in against(baseline, row, higher_is_better=False)
    row.scores.update({0: 0.5, 1: 0.3, 2: 0.6})
    assert against(row, baseline, higher_is_better=True).endswith("within noise")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("methods=[adapfet]", "'adapfet' is not a method. Did you mean 'adapeft'"),
        ("methods=[bitfit:row]", "bitfit chooses by tensor"),
        ("budgets=[0]", "must be above 0"),
        ("seeds=[]", "seeds = []"),
        ("parallel=0", "parallel = 0: should be greater than 0"),
    ],
)
def test_bad_input(override, said):
    with pytest.raises(AdapeftError) as error:
        settings(override)
    assert said in str(error.value)


def test_every_method_has_its_own_look(monkeypatch):
    """Matplotlib has only ten default colours, and there are more methods."""
    figures = []
    monkeypatch.setattr(pictures, "png_of", figures.append)
    rest = (100.0, 1.0, 1.0, 1.0, 1.0, (1e-3,), ())
    rows = [Row(f"method {i}", "element", "0.5%", {0: 0.5, 1: 0.6}, {}, *rest) for i in range(21)]
    pictures.draw_spread(rows, "accuracy")
    looks = {(to_rgba(line.get_color()), line.get_marker()) for line in figures[0].axes[0].lines}
    assert len(looks) == 21


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("select.statistics", {"statistics": "runs/other"}),
        ("select.memory_per_device", {"memory_per_device": "1GiB", "budget": "0.5%"}),
        ("train.subset", {"subset": "a.safetensors"}),
    ],
)
def test_what_would_decide_for_every_method(config, key, given):
    """Each would be silently ignored, or make all methods train the same subset."""
    with pytest.raises(AdapeftError, match=rf"{key} = .+ in a comparison .* or add {key}=null"):
        check(with_values(config, key.partition(".")[0], **given), settings(), inspect)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("reference=lora", r"reference = lora: is not among methods = \[adapeft, random\]\. Add it, or name one"),
        ("sweep=asha", r"learning_rates = \[\]: sweep = asha compares several. Give at least two"),
        ("learning_rates=[1e-3]", r"= \[0.001\]: a sweep compares several. .* set train.learning_rate=0.001\."),
    ],
)
def test_what_does_not_go_together(config, given, said):
    with pytest.raises(AdapeftError, match=said):
        check(config, settings(given), inspect)


def test_the_same_twice(config):
    with pytest.raises(AdapeftError, match="seeds: 0 is given twice"):
        check(config, settings("seeds=[0,0]"), inspect)


def test_two_at_once(config):
    """A second comparison in the folder is refused only while the first one runs."""
    single = settings(
        "methods=[adapeft:row]", "seeds=[0]"
    )  # with more, a thread may begin the next after the interrupt

    def run_another(inner):
        with pytest.raises(AdapeftError, match="another adapeft command is writing there"):
            compare(config, single, lambda text: None, Runner())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config, single, lambda text: None, run_another)
    assert finished(compare(config, single, lambda text: None, Runner()))


@pytest.mark.slow
def test_a_failing_command_says_why(config, tmp_path):
    data = config.data.model_copy(update={"train": str(tmp_path / "gone.jsonl")})
    # The folder is named after the learning rate, as in a sweep: runs must not share config and log files.
    missing = config.model_copy(update={"data": data, "output": str(tmp_path / "sweep" / "0.003")})
    metrics, failure = Machines().run(missing)
    assert metrics is None
    assert "gone.jsonl" in failure
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"0.003.yaml", "0.003.log"}


@pytest.mark.slow
def test_the_real_thing(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    options = ["methods=[adapeft:row,random:row]", "seeds=[0,1]", "budgets=[20%,40%]", "max_steps=12", "parallel=2"]
    more = ["workers=1", f"output={tmp_path / 'out'}"]
    done = adapeft("compare", config, *options, *more, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run 8/8" in done.stdout
    report = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| adapeft:row | 40.0% |" in report or "| adapeft:row | 40% |" in report
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/*/delta.safetensors"))
    again = adapeft("compare", config, *options, *more, timeout=600)
    assert again.returncode == 0
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/*/delta.safetensors")) == before

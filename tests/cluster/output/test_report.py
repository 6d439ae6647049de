"""The report of a run: one self-contained page, and pictures that are not blank."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from adapeft.choose.elements import filled_by_draw
from adapeft.choose.joint_elements import choose_elements_jointly
from adapeft.config.experiments import Trials
from adapeft.config.load import parse_config
from adapeft.measure.groups import Groups
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard
from adapeft.measure.storage import TABLE, save_elements, save_groups
from adapeft.methods.registry import get_method
from adapeft.model.structure import ParameterInfo
from adapeft.parts.rows import Rows
from adapeft.ranks import OneRank
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from adapeft.tasks.generation import Generation
from cluster.output import frontier
from cluster.output.folder import RunFolder
from cluster.output.frontier import knee_of
from cluster.output.generations import save_generations
from cluster.output.measured import chosen_of, one_by_one, predicted_decrease
from cluster.output.metrics import load_metrics
from cluster.output.pictures.map import place_of, shares_of
from cluster.output.report import write_report, write_validation_report
from cluster.output.validation import load_validation, save_validation
from solver import Frontier
from tests.support.browser import CHROMIUM, check_page

NAMES = ("model.embed.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight")
WEIGHTS = tuple(
    ParameterInfo(name, (8, 4), role, layer, 0.5, 0)
    for name, role, layer in zip(NAMES, ("model.embed.weight", "mlp.weight", "mlp.weight"), (-1, 0, 1), strict=True)
)
MEASURED = {"frontier", "influence", "slopes", "memory"}
ALWAYS = {"loss", "metric", "chosen"}
ESTIMATED = {"weights": 100 * 2**20, "optimizer": 0, "process": 700 * 2**20}


class Page(HTMLParser):
    """Collects the tags of a page, and the texts outside of its style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def write_run(path, *, measured=True, method="adapeft", task="sequence-classification", always=5):
    """Write the artifacts of a finished run; return its folder and config."""
    config = parse_config(
        {
            "model": {"name": "/models/<b>tiny</b>", "task": task},
            "data": {"train": "train.jsonl", "evaluation": "validation.jsonl", "text": "text", "label": "label"},
            "output": str(path),
        }
    )
    folder = RunFolder(path)
    groups = Groups(WEIGHTS, "row", 200)
    slopes = np.linspace(0.5, 0.01, groups.num_groups)
    columns = {"slope": slopes, "slope_error": slopes / 3, "curvature": np.full(groups.num_groups, 0.1)}
    derived = {"chosen": np.zeros(groups.num_groups, dtype=np.int64)}
    if measured:
        derived["influence"] = slopes / 10
    save_groups(path, groups, columns if measured else {}, {}, **derived)
    parts = {NAMES[0]: Rows((8, 4), torch.tensor([0, 3]), 0), NAMES[1]: Rows((8, 4), torch.tensor([5]), 0)}
    choice = Choice(
        method=method, granularity="row", budget=12, reach=0.1, num_total=200, value=0.3, bound=0.3, gap=0.0
    )
    Subset(parts, choice=choice).save(folder.subset)
    metrics = {
        "metric": "accuracy",
        "before": {"loss": 1.1, "accuracy": 0.25},
        "after": {"loss": 0.6, "accuracy": 0.75},
        "last": {"loss": 0.7, "accuracy": 0.7},
        "best_step": 10,
        "history": [{"step": 10, "loss": 0.6, "accuracy": 0.75}, {"step": 20, "loss": 0.7, "accuracy": 0.7}],
        "total_parameters": 200,
        "trainable_parameters": 12,
        "always_trained_parameters": always,
        "num_steps": 20,
        "learning_rate": 3e-3,
        "delta_bytes": 2048,
        "peak_memory_bytes": 800 * 2**20,
        "seconds": {"select": 1.5, "train": 2.5},
        "choice": {"method": method, "granularity": "row", "value": 0.3 if measured else None},
    }
    if measured:
        metrics["estimated_memory"] = {"training": {"parts": ESTIMATED, "is_bound": True}}
    folder.metrics.write_text(json.dumps(metrics))
    folder.logs.mkdir()
    events = [{"message": "training", "done": step, "loss": 1.0 / step} for step in (5, 10, 15, 20)]
    # The process was killed while it wrote the last line.
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"message": "trai')
    return folder, config


def write_element_run(path, budget=20, reach=10.0):
    """Write the artifacts of a run that filled a joint choice of single elements up with a draw, as is the default."""
    folder, config = write_run(path, always=0)
    draw = torch.Generator().manual_seed(0)
    groups = Groups(WEIGHTS, "element", 200)
    scales = (1.0, 0.1, 0.1)
    elements = tuple(
        ElementShard(
            Slice(index, 0, info.count),
            {name: scale * torch.rand(info.count, generator=draw) for name in ("slope", "curvature")},
        )
        for index, (info, scale) in enumerate(zip(WEIGHTS, scales, strict=True))
    )
    sums = {name: np.array([float(shard.sums()[name]) for shard in elements]) for name in ("slope", "curvature")}
    values = get_method("adapeft").values(sums, reach)
    save_groups(path, groups, {**sums, "slope_error": sums["slope"] / 4}, {}, influence=values)
    save_elements(path, elements, OneRank())
    chosen = choose_elements_jointly(groups, elements, budget, reach, OneRank())
    filled = filled_by_draw(groups, chosen, 3).described(
        method="adapeft", granularity="element", budget=budget, reach=reach, num_total=200, seed=3
    )
    filled.save(folder.subset)
    metrics = json.loads(folder.metrics.read_text())
    metrics["choice"] = {"method": "adapeft", "granularity": "element", "value": chosen.choice.value}
    metrics["trainable_parameters"] = budget
    folder.metrics.write_text(json.dumps(metrics))
    return folder, config, chosen, float(values.sum())


def validation(num_draws=12):
    """Return the result of a validation with two settings, in which two subsets raised the loss and one diverged."""
    generator = np.random.default_rng(0)
    predicted = generator.lognormal(-5, 2, num_draws)
    decreases = [-0.01, -0.02, -np.inf, *(predicted * generator.lognormal(0, 0.5, num_draws))[3:]]
    names = ("influence (adam)", "joint influence (adam)", "least joint influence (adam)")
    correlations = {names[0]: {"all": 0.9, "0.1": 0.8}, "count": {"all": 0.5, "0.1": None}, "SNIP": {"all": None}}
    setting = {"learning_rate": 1e-3, "planned_constant": 0.3, "fitted_constant": 0.75, "overshooting": 0.25}
    setting |= {"correlations": correlations, "at_fitted_reach": {names[0]: 0.95}, "decreases": decreases}
    setting["predictions"] = {name: predicted.tolist() for name in names}
    draws = [{"size": (0.0, 0.1, 0.5)[index % 3], "count": 10, "tensors": 1} for index in range(num_draws)]
    settings = [{**setting, "steps": steps} for steps in (20, 60)]
    return {"settings": settings, "draws": draws, "granularity": "row"}


def names_of(page):
    return [attributes["id"] for attributes in page.all("figure")]


def test_a_page_has_every_figure_and_refers_to_nothing_outside(tmp_path):
    folder, config = write_run(tmp_path)
    save_generations(folder.generations_before, [Generation(3, "2+2?<script>", "4", "five & six")])
    save_generations(folder.generations, [Generation(3, "2+2?<script>", "4", "")])
    write_report(folder, config)
    text = folder.report.read_text(encoding="utf-8")
    page = Page(text)
    assert set(names_of(page)) == ALWAYS | MEASURED
    assert len(page.all("img")) == len(names_of(page))
    for image in page.all("img"):
        assert len(image["alt"]) > 40
        assert image["src"].startswith("data:image/png;base64,")
    assert "http" not in text
    assert "url(" not in text
    assert not page.all("script")
    assert not [attributes for _, attributes in page.tags if attributes.get("href") not in (None, "data:,")]
    shown = " ".join(page.texts)
    for expected in ("0.2500 → 0.7500", "12 of 200 parameters", "2.0 KiB", "<b>tiny</b>", "2+2?<script>", "five & six"):
        assert expected in shown
    assert not page.all("b")
    assert "(empty)" in shown
    assert [attributes for attributes in page.all("meta") if attributes.get("name") == "viewport"]


@pytest.mark.slow
def test_pictures_are_files_too_and_not_blank(tmp_path):
    folder, config = write_run(tmp_path)
    write_report(folder, config)
    files = {path.stem: path.read_bytes() for path in folder.pictures.iterdir()}
    assert files.keys() == ALWAYS | MEASURED
    for name, content in files.items():
        with Image.open(BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG"
            dark = np.asarray(image.convert("L")) < 128
            assert 0.002 < dark.mean() < 0.5, name


def test_what_a_run_has_not_measured_is_left_out(tmp_path):
    folder, config = write_run(tmp_path, measured=False, method="random")
    write_report(folder, config)
    page = Page(folder.report.read_text(encoding="utf-8"))
    assert set(names_of(page)) == ALWAYS
    assert {path.stem for path in folder.pictures.iterdir()} == ALWAYS
    assert "influence" not in page.texts
    assert not page.all("h3")


def test_a_run_of_elements_shows_what_was_chosen_without_the_draw(tmp_path):
    folder, config, chosen, total = write_element_run(tmp_path)
    subset = Subset.load(folder.subset)
    assert 0 < chosen.count < subset.count == 20
    found = chosen_of(folder, subset)
    assert {name: part.count for name, part in found.parts.items()} == {
        name: part.count for name, part in chosen.parts.items()
    }
    write_report(folder, config)
    page = Page(folder.report.read_text(encoding="utf-8"))
    assert set(names_of(page)) == ALWAYS | MEASURED | {"prediction"}
    shown = " ".join(page.texts)
    assert f"{chosen.count} parameters were chosen, and {20 - chosen.count} drawn at random" in shown
    assert "not shown" in shown
    said = f"their sum would be a loss decrease of {total:,.4g}, but all together promise {chosen.choice.value:.3g}."
    assert f"Elements are counted one by one, although many change the outputs alike: {said}" in shown
    assert "for the 3 tensors with the most influence of 3" in shown


def test_a_draw_that_is_unknown_is_shown_with_the_choice(tmp_path):
    folder, config, chosen, _ = write_element_run(tmp_path)
    (tmp_path / TABLE).unlink()  # as of a run that trains a saved subset
    assert chosen_of(folder, Subset.load(folder.subset)) is None
    write_report(folder, config)
    page = Page(folder.report.read_text(encoding="utf-8"))
    assert set(names_of(page)) == ALWAYS | {"memory", "prediction"}
    shown = " ".join(page.texts)
    said = f"{chosen.count} parameters were chosen, and {20 - chosen.count} drawn at random"
    assert f"{said} among all others; both are counted." in shown


def test_influence_that_adds_up_is_shown_as_it_is(tmp_path):
    values = np.array([0.5, -1.0, 0.25])
    assert one_by_one(values, Choice(granularity="row", value=0.3)) is None
    assert one_by_one(values, Choice(granularity="element", value=0.3)) is None
    jointly = one_by_one(values, Choice(granularity="row", value=0.3, additive_value=0.6))
    assert jointly.startswith("Rows are counted one by one")
    drawn = one_by_one(values, Choice(granularity="element", status="drawn", reliability=0.03))
    assert drawn.startswith("A random draw was taken, because the slopes are mostly noise")
    assert "sum would be a loss decrease of 0.75, but the chosen ones together promise 0.3." in jointly
    assert shares_of(values).tolist() == pytest.approx([2 / 3, -4 / 3, 1 / 3])


def test_the_predicted_decrease_is_compared_where_nothing_else_is_trained(tmp_path):
    """What is always trained lowers the loss too, and the influence does not count that."""
    folder, config = write_run(tmp_path / "alone", always=0)
    write_report(folder, config)
    page = Page(folder.report.read_text(encoding="utf-8"))
    assert set(names_of(page)) == ALWAYS | MEASURED | {"prediction"}
    metrics = load_metrics(folder.metrics)
    measured, summed = "0.4 measured after the last step.", "The sum counts groups"
    assert f"0.3 predicted, summed over groups, {measured} {summed}" in " ".join(page.texts)
    subset = Subset.load(folder.subset)
    subset.described(additive_value=0.5).save(folder.subset)
    write_report(folder, config)
    jointly = " ".join(Page(folder.report.read_text(encoding="utf-8")).texts)
    assert f"0.3 predicted, {measured}" in jointly
    assert summed not in jointly
    subset.described(joint_value=0.25).save(folder.subset)
    write_report(folder, config)
    said = f"0.3 predicted, summed over groups, 0.25 in one step of all, {measured} {summed}"
    assert said in " ".join(Page(folder.report.read_text(encoding="utf-8")).texts)
    subset.described(value=metrics["before"]["loss"] + 0.1).save(folder.subset)
    write_report(folder, config)
    assert "It is more than the loss itself" in " ".join(Page(folder.report.read_text(encoding="utf-8")).texts)
    assert predicted_decrease(subset.choice, metrics) == (0.3, True, None)
    for other in ({"source": {"subset": "a"}}, {"reach": "inf"}, {"method": "sam"}, {"value": None}):
        assert predicted_decrease(subset.described(**other).choice, metrics) is None


def test_a_validation_has_its_page(tmp_path):
    folder, config = write_run(tmp_path)
    path = tmp_path / "validation.json"
    save_validation(path, validation(), Trials())
    write_validation_report(folder, config, load_validation(path, Trials()))
    page = Page(folder.validation_report.read_text(encoding="utf-8"))
    assert names_of(page) == ["gains", "correlations"]
    assert len(page.all("tr")) == 2 + 1 + 3
    shown = " ".join(page.texts)
    assert "subsets that raised the loss, 6 in all panels" in shown
    assert "0.90" in page.texts
    assert not folder.report.is_file()
    old = validation()
    for setting in old["settings"]:
        del setting["predictions"]
    write_validation_report(folder, config, old)
    assert names_of(Page(folder.validation_report.read_text(encoding="utf-8"))) == ["correlations"]


@pytest.mark.slow
def test_only_adapeft_predicts_losses(tmp_path):
    captions = {}
    for method in ("adapeft", "snip"):
        folder, config = write_run(tmp_path / method, method="adapeft")
        subset = Subset.load(folder.subset)
        subset.described(method=method).save(folder.subset)
        if method == "snip":  # a column of its own
            groups = Groups(WEIGHTS, "row", 200)
            values = np.linspace(1, 2, groups.num_groups)
            save_groups(folder.path, groups, {"sensitivity": values}, {}, influence=values)
        write_report(folder, config)
        page = Page(folder.report.read_text(encoding="utf-8"))
        captions[method] = " ".join(page.texts)
    assert "predicted loss decrease" in captions["adapeft"]
    assert "predicted loss decrease" not in captions["snip"]
    assert "value to the method snip" in captions["snip"]


def test_the_frontier_of_a_servable_choice_keeps_the_rank(tmp_path, monkeypatch):
    folder, _ = write_run(tmp_path)
    monkeypatch.setattr(frontier, "MAX_RANK", 2)
    subset, groups = Subset.load(folder.subset), Groups(WEIGHTS, "row", 200)
    slopes = np.linspace(0.5, 0.01, groups.num_groups)
    columns = {"slope": slopes, "curvature": np.full(groups.num_groups, 0.1)}
    most = []
    for key in ({}, {"select.servable": True}):
        save_groups(folder.path, groups, columns, key, influence=slopes / 10)
        most.append(frontier.frontier_of(folder, subset).curve.counts.max())
    assert most[1] == 3 * 2 < most[0]


def test_the_frontier_of_single_elements(tmp_path):
    folder, _ = write_run(tmp_path)
    draw = torch.Generator().manual_seed(0)
    groups = Groups(WEIGHTS, "element", 10_000_000)  # whose smallest share is 100 elements
    elements = tuple(
        ElementShard(
            Slice(index, 0, info.count),
            {name: torch.rand(info.count, generator=draw) for name in ("slope", "curvature")},
        )
        for index, info in enumerate(WEIGHTS)
    )
    save_groups(folder.path, groups, {"slope": np.ones(len(WEIGHTS))}, {})
    save_elements(folder.path, elements, OneRank())
    chosen = choose_elements_jointly(groups, elements, 20, 0.1, OneRank()).described(budget=20, reach=0.1)
    found = frontier.frontier_of(folder, chosen)
    assert (found.num_total, found.budget) == (10_000_000, 20)
    assert found.curve.budgets.tolist() == [1, 2, 5, 10, 20, 50]
    assert found.curve.values[0] < found.curve.values[-1] / 2
    assert found.curve.values[found.curve.budgets.tolist().index(20)] == pytest.approx(chosen.choice.value, rel=0.02)
    one_by_one = Subset(chosen.parts).described(budget=20, reach=0.1)
    assert frontier.frontier_of(folder, one_by_one) is None


def test_the_knee_is_where_the_marginal_value_falls_below_the_average():
    costs = np.arange(1.0, 101.0)
    # d/dx of sqrt(x / 100) equals 1 / 100 at x = 25.
    assert costs[knee_of(costs, np.sqrt(costs / 100))] == 25
    # Where no point is above the line, it is the last one or any on the line.
    assert knee_of(np.array([1.0, 10.0]), np.array([0.01, 1.0])) == 1


def test_fewer_parameters_may_have_nearly_the_value_of_the_run():
    budgets, values = np.array([1, 2, 5, 10, 20]), np.array([0.1, 0.5, 0.985, 0.992, 1.0])
    curve = Frontier(budgets, values, values, budgets, budgets)
    assert [frontier.RunFrontier(curve, 100, budget).enough for budget in (20, 10, 5, 7)] == [10, 5, None, None]


def test_places_of_names():
    assert place_of("bert.encoder.layer.11.attention.self.query.weight") == (11, "attention.self.query.weight")
    assert place_of("model.layers.3.experts.5.w1.weight") == (3, "experts.5.w1.weight")
    assert place_of("model.embed_tokens.weight") == (-1, "model.embed_tokens.weight")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_every_figure_on_a_narrow_screen(tmp_path, dark):
    folder, config = write_run(tmp_path / "run")
    save_generations(folder.generations, [Generation(0, "word" * 200, "4", "x" * 500)])
    write_report(folder, config)
    check_page(folder.report, tmp_path, dark=dark, num_images=len(ALWAYS | MEASURED))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_a_validation_on_a_narrow_screen(tmp_path, dark):
    folder, config = write_run(tmp_path / "run")
    write_validation_report(folder, config, validation())
    check_page(folder.validation_report, tmp_path, dark=dark, num_images=2)

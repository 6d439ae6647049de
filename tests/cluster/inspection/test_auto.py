"""``select.groups: auto`` stands for LoRA on a language model whose budget holds it."""

from __future__ import annotations

import math

import pytest

from adapeft.config.experiments import Contender
from adapeft.config.load import load_config
from adapeft.measure.groups import groups_of
from adapeft.methods.lora.method import least_lora, lora_counts
from adapeft.model.structure import describe_parameters
from adapeft.parts.lora import Lora
from adapeft.sections.budget import Budget
from adapeft.subset.subset import Subset
from adapeft.tasks.registry import TASKS
from cluster.commands.compare.run import Job
from cluster.inspection.auto import for_model
from tests.oracles.parts import make_llama
from tests.support.checkpoints import write_bert, write_colours, write_config, write_gpt2, write_text
from tests.support.tiny import make_bert, make_gpt2


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """The path of a config of a tiny GPT-2, the model, and the number of parameters of LoRA of rank 1."""
    folder = tmp_path_factory.mktemp("language")
    texts = (write_text(folder / f"{split}.txt", 900) for split in ("train", "evaluation"))
    base = write_gpt2(folder / "base")
    path = write_config(folder / "run.yaml", base, *texts, task="causal-lm")
    model = type(make_gpt2()).from_pretrained(base)
    return path, model, sum(lora_counts(groups_of(model, load_config(path).select)))


def test_lora_where_the_budget_holds_it(language):
    path, model, least = language
    config = load_config(path, [f"budget={least}", "select.exclude=*wte*", "seed=7"])
    found, said = for_model(config, model)
    expected = load_config(path, [f"budget={least}", "select.exclude=*wte*", "seed=7", "select.method=lora"])
    assert found == expected
    assert "LoRA on all linear layers" in said
    assert for_model(found, model) == (found, "")


def method_for(model, path, *overrides):
    return for_model(load_config(path, overrides), model)[0].select.method


def test_lora_on_a_draw_of_layers_where_the_budget_holds_some(language):
    path, model, least = language
    smallest = min(lora_counts(groups_of(model, load_config(path).select)))
    for budget in (least - 1, smallest):
        found, said = for_model(load_config(path, [f"budget={budget}"]), model)
        assert found == load_config(path, [f"budget={budget}", "select.method=lora"])
        assert "LoRA on a random draw of the linear layers" in said
    below = load_config(path, [f"budget={smallest - 1}"])
    assert for_model(below, model) == (below, "")
    assert below.select.granularity == "element"


def test_single_elements_where_few_layers_of_many_fit(language):
    """LoRA was tried with a 25th of its parameters on all layers, not with fewer."""
    path, model = language[0], make_llama(num_layers=20)
    every = lora_counts(groups_of(model, load_config(path).select))
    budget = math.ceil(sum(every) / 25)
    assert min(every) < budget
    assert method_for(model, path, f"budget={budget}") == "lora"
    assert method_for(model, path, f"budget={budget - 1}") == "adapeft"


def test_of_the_layers_that_may_be_chosen(language):
    path, model, least = language
    assert "all linear layers" in for_model(load_config(path, [f"budget={least}"]), model)[1]
    found, said = for_model(load_config(path, [f"budget={least - 1}", "select.include=*h.0.*"]), model)
    assert "all linear layers" in said
    assert found.select.method == "lora"
    assert method_for(model, path, "budget=90%", "select.include=*wte*") == "adapeft"


@pytest.mark.parametrize(
    ("override", "method"),
    [
        ("select.groups=element", "adapeft"),
        ("select.groups=row", "adapeft"),
        ("select.options=[lora]", "adapeft"),
        ("select.fill=false", "adapeft"),
        ("select.measure=exact", "adapeft"),
        ("select.budget=auto", "adapeft"),
        ("select.statistics=runs/other", "adapeft"),
        ("train.subset=other.safetensors", "adapeft"),
        ("select.method=random", "random"),
        ("select.calibration=64", "lora"),
    ],
)
def test_what_asks_for_a_choice_gets_it(language, override, method):
    path, model, least = language
    budget = [] if "budget" in override else [f"budget={least}"]
    assert method_for(model, path, *budget, override) == method


def test_only_where_tokens_are_predicted(language):
    """A multiple choice has no head that its labels determine either."""
    path, model, least = language
    config = load_config(path, [f"budget={least}"])
    tasks = {task: config.model.model_copy(update={"task": task}) for task in TASKS}
    found = {task: for_model(config.model_copy(update={"model": of}), model)[0].select for task, of in tasks.items()}
    assert {task for task, select in found.items() if select.method == "lora"} == {
        *("causal-lm", "instruct", "seq2seq", "masked-lm")
    }


def test_what_servers_load(language):
    """They load rows too, which learn less."""
    model, path = make_llama(), language[0]
    config = load_config(path, ["select.servable=true", "budget=90%"])
    least = sum(lora_counts(groups_of(model, config.select)))
    for budget, layers in ((least, "all linear layers"), (least - 1, "a random draw")):
        below = ["select.servable=true", f"budget={budget}"]
        found, said = for_model(load_config(path, below), model)
        assert (found.select.method, found.select.servable) == ("lora", True)
        assert layers in said
    rows = load_config(path, [*below, "select.groups=row"])
    assert for_model(rows, model) == (rows, "")


def test_a_classifier_is_chosen_for(tmp_path):
    path = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    config = load_config(path, ["budget=90%"])
    assert least_lora(groups_of(make_bert(), config.select)) is not None
    assert for_model(config, make_bert()) == (config, "")


def test_the_command_says_so_and_goes_on(language, command, tmp_path):
    path, model, least = language
    asked = ("select", path, f"budget={least}", "select.groups=auto", f"output={tmp_path / 'run'}")
    done = command(*asked)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "groups LoRA on all linear layers" in shown
    assert "select.groups=element or row chooses single elements or rows" in shown
    subset = Subset.load(tmp_path / "run" / "subset.safetensors")
    layers = {info.name for info in describe_parameters(model) if info.is_linear and info.layer >= 0}
    assert set(subset.parts) == layers
    assert all(isinstance(part, Lora) and part.rank == 1 for part in subset.parts.values())
    assert load_config(tmp_path / "run" / "config.yaml").select.method == "lora"
    again = command(*asked)
    assert again.returncode == 0, again.stderr
    estimated = command("estimate", path, f"budget={least}")
    assert "select.groups = auto: LoRA on all linear layers" in " ".join(estimated.stdout.split())


@pytest.mark.parametrize(("contender", "groups"), [("adapeft", "element"), ("adapeft:row", "row"), ("lora", "tensor")])
def test_what_is_compared_with_lora_is_chosen(language, tmp_path, contender, groups):
    path, model, least = language
    job = Job(Contender.parse(contender), Budget.parse(least), 0, None, tmp_path)
    select = for_model(job.applied_to(load_config(path)), model)[0].select
    assert (select.method, select.groups) == (contender.partition(":")[0], groups)


def test_what_cannot_be_validated_says_how_it_can(language, command, tmp_path):
    path, _, least = language
    done = command("validate", path, f"budget={least}", f"output={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "it does not measure the loss" in done.stderr
    assert "select.groups: element" in done.stderr

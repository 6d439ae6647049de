"""``adapeft transfer``: choose a subset for another model from a run's statistics, and optionally verify it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from adapeft.config.config import Config
from adapeft.config.experiments import Transfer
from adapeft.config.keys import as_yaml, content_key, differing, flatten, measurement_key
from adapeft.config.load import load_config
from adapeft.config.write import to_yaml
from adapeft.data.batches import draw_calibration
from adapeft.errors import AdapeftError
from adapeft.files.artifact import provenance, save_json
from adapeft.files.json_numbers import infinity_in_words, undefined_as_null
from adapeft.measure.direction import measure_direction
from adapeft.measure.exact.elementwise import mean_gradient
from adapeft.measure.groups import Groups, groups_of
from adapeft.measure.measure import ready
from adapeft.measure.mode import measuring_mode
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import WholeModel
from adapeft.measure.statistics import Statistics
from adapeft.measure.storage import load_statistics
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.base.options import ValuedOptions
from adapeft.methods.random.method import random_subset
from adapeft.methods.registry import Plan, ValuedMethod, get_method
from adapeft.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from adapeft.model.checkpoint.files import has_weights
from adapeft.model.load import CONFIG_ERRORS, build_structure
from adapeft.model.quantization import stored_quantization
from adapeft.ranks import OneRank
from adapeft.selection.choose import check_budget, choose
from adapeft.subset.empty import check_not_empty, or_random
from adapeft.subset.subset import Subset
from adapeft.transfer.transfer import Profiles, Scores, allot, counterparts, fill, with_own_slopes
from adapeft.transfer.verify import agreement, random_subsets, tensor_densities, uniform_subset
from cluster.output.folder import SUBSET, RunFolder
from cluster.output.place import check_is_folder
from cluster.ranks.inputs import check_loss, load_inputs
from cluster.run.pipeline import select
from cluster.run.session import Session
from cluster.terminal.console import Terminal, number_table, short

_OF_THE_TARGET = (
    *("model.", "data.", "seed", "select.measure", "select.rank"),
    *("select.groups", "select.include", "select.exclude", "select.always_train", "select.options", "select.joint"),
)
"""Keys that describe the target, its candidates and its examples. All other keys that statistics depend on must agree
with the source. ``options`` and ``joint`` have checks of their own."""


@dataclass(frozen=True)
class Transferred:
    """A subset for the target model, and the data that it was chosen from."""

    config: Config
    subset: Subset
    groups: Groups
    profiles: Profiles
    method: ValuedMethod
    reach: float
    scores: Scores | None


def run(source: Path, model: str, settings: Transfer, overrides: list[str], terminal: Terminal) -> None:
    """Choose a subset, measure the target if ``settings.verify``, and write and show the result.

    Raises:
        AdapeftError: see ``target_config`` and ``transfer``; or the output folder holds a subset already.
    """
    config = target_config(source, model, settings, overrides)
    check_is_folder(config.output, "transfer")
    output = Path(config.output)
    if output.resolve() == source.resolve() or (output / SUBSET).exists():
        raise AdapeftError(f"output = {output} holds a subset already. Give another folder: output=….")
    found = transfer(source, config, settings)
    verified = None
    if settings.verify:
        best = _own_choice(config, output / "measured", config.seed, terminal)
        # The best subset was also chosen for the noise in its own statistics, which therefore overrate it.
        _own_choice(config, output / "measured-again", (config.seed + 1) % 2**32, terminal)
        verified = verify(found, load_statistics(output / "measured-again")[0], best)
    save_transfer(output, source, found, verified)
    terminal.show_choice(found.subset)
    _show(found.subset, verified, terminal)
    terminal.note(f"to train it: train.subset={short(output / 'subset.safetensors')} {_changed(config, source)}")


def target_config(source: Path, model: str, settings: Transfer, overrides: list[str]) -> Config:
    """Return the source run's config with the target's model, and with the budget and groups if they are given.

    Raises:
        AdapeftError: ``source`` is no run with statistics, or an override is invalid.
    """
    folder = RunFolder(source)
    folder.check_has_statistics(f"--from {source}")
    target = [f"model.name={model}", "model.revision=null", "train.subset=null", "select.statistics=null"]
    if settings.budget is not None:
        target.append(f"select.budget={settings.budget}")
    if settings.groups != "auto":
        target.append(f"select.groups={settings.groups}")
    config, measured = load_config(folder.config, [*target, *overrides]), load_config(folder.config)
    if config.model.name != load_config(folder.config, target[:1]).model.name:
        raise AdapeftError(f"model.name = {config.model.name}: --to names another target, {model}. Give one of them.")
    if config.select.method != measured.select.method:
        raise AdapeftError(
            f"select.method = {config.select.method}: the run in {source} measured for {measured.select.method}. Leave "
            f"select.method out, or give a run of {config.select.method}."
        )
    if config.select.budget.is_auto:
        raise AdapeftError(
            "select.budget = auto: transfer divides a given budget among the parameters of the target. Give one, such "
            f"as budget={100 * _share_taken(folder):.3g}%, which the run in {source} took."
        )
    if config.select.servable:
        raise AdapeftError(
            "select.servable = true: transfer divides the budget among all parameters of the target. Choose for "
            "servers by measuring the target (adapeft run), or set select.servable: false."
        )
    other = _measured_differently(config, measured)
    if other:
        raise AdapeftError(
            f"--from {source}: the run there measured under other conditions:\n  "
            + "\n  ".join(other)
            + "\nLeave these keys out, or measure the source with them."
        )
    if isinstance(config.select, AdaPEFTOptions):
        config = load_config(folder.config, [*target, "select.joint=false", "select.fill=auto", *overrides])
        joint = flatten(config)["select.joint"]
        if joint is not False:
            raise AdapeftError(
                f"select.joint = {as_yaml(joint)}: the joint curvature of groups cannot be transferred to another "
                "model, so each group is valued alone. Leave it out."
            )
    return config


def _changed(config: Config, source: Path) -> str:
    """Return the overrides that train the target with the config of the run in ``source``."""
    here, there = config.model, load_config(RunFolder(source).config).model
    revision = f" model.revision={here.revision or 'null'}" if here.revision != there.revision else ""
    return f"model.name={here.name}{revision}"


def _share_taken(folder: RunFolder) -> float:
    choice = Subset.load(folder.subset).choice
    return float(choice.needed("budget") / choice.needed("num_total"))


def _measured_differently(config: Config, measured: Config) -> list[str]:
    """Return the keys that statistics depend on and that differ, other than those that describe the target."""
    here, there = measurement_key(config), measurement_key(measured)
    return differing({key: value for key, value in here.items() if not key.startswith(_OF_THE_TARGET)}, there)


def transfer(source: Path, config: Config, settings: Transfer) -> Transferred:
    """Choose for ``config.model`` from the statistics in ``source``; whole tensors need no weights of the target.

    Raises:
        AdapeftError: the source has no statistics, the target does not exist, too few of its parameters have a
            counterpart in the source, or none of them promises a lower loss.
    """
    statistics, key = load_statistics(source)
    method = get_method(config.select.method)
    if not statistics.columns or not isinstance(method, ValuedMethod):
        raise AdapeftError(
            f"--from {source}: {config.select.method} measures nothing that can be transferred. Give a run of adapeft, "
            "on a language model with select.groups: element or row."
        )
    if isinstance(config.select, AdaPEFTOptions) and config.select.options:
        raise AdapeftError(
            f"select.options = {list(config.select.options)}: only rows can be transferred, not a choice among kinds. "
            f"Give select.options=[] to transfer the rows that were measured with them."
        )
    reach = float(Subset.load(RunFolder(source).subset).choice.needed("reach"))
    value = partial(method.value, reach=reach)
    profiles = Profiles.of(statistics, value)
    structure = _structure(config)
    groups = groups_of(structure, config.select)
    if settings.inside in ("gradient", "slope") and method.window_rank(groups, config.select):
        raise AdapeftError(
            f"inside = {settings.inside}: needs the gradients of single elements of the target, and select.measure is "
            f"low-rank, as auto is for a model of {groups.num_total:,} parameters. Add select.measure=exact if the "
            "memory suffices (adapeft estimate), or leave inside out."
        )
    budget = check_budget(groups, config.select)
    checkpoint = _checkpoint(config, structure)
    if settings.inside == "slope":
        unmapped, mapped = counterparts(profiles, groups)
        own = _by_slope(config, groups, statistics, key)
        subset = choose(config.select, own, reach=reach, seed=config.seed, ranks=OneRank())
        subset = subset.described(unmapped=list(unmapped), mapped=mapped)
        scores: Scores | None = partial(own.values_of, value=value)
    else:
        allotment = allot(profiles, groups, budget)
        scores = _scores(config, settings, groups, checkpoint, key)
        subset = fill(groups, allotment, scores)
        plan = Plan(budget, reach, config.seed, config.select)
        if isinstance(config.select, ValuedOptions) and config.select.if_empty == "random":
            subset = or_random(subset, lambda: random_subset(groups, plan).of_model(groups.always_train, groups.new))
    subset = subset.described(
        method=config.select.method,
        budget=budget,
        reach=infinity_in_words(reach),
        seed=config.seed,
        transferred={"from": str(source), "inside": settings.inside},
        config=to_yaml(config),
    )
    check_not_empty(subset)
    if checkpoint is not None:
        subset = subset.described(fingerprint=checkpoint.fingerprint(groups.new))
    return Transferred(config, subset, groups, profiles, method, reach, scores)


def verify(found: Transferred, measured: Statistics, best: Subset) -> dict[str, Any]:
    """Compare a transferred subset, random ones and a uniform one with the target's own best.

    Args:
        found: transferred subset.
        measured: statistics of the target.
        best: subset chosen from other statistics of the target under the same budget.
    """

    def held(subset: Subset) -> dict[str, float]:
        return asdict(agreement(measured, found.method, found.reach, subset, best))

    budget = found.subset.choice.needed("budget")
    plan = Plan(budget, found.reach, found.config.seed, found.config.select)
    draws = [held(subset) for subset in random_subsets(found.groups, plan)]
    result = {
        "transferred": held(found.subset),
        "random": {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]},
        "density_correlation": _density_correlation(found, measured),
    }
    if found.scores is not None:
        result["uniform"] = held(uniform_subset(found.groups, budget, found.scores))
    return result


def _own_choice(config: Config, output: Path, seed: int, terminal: Terminal) -> Subset:
    """Measure the target on examples drawn with ``seed``, and choose; not LoRA, as auto might mean for the target."""
    settings = config.select.model_copy(update={"groups": config.select.granularity})
    own = config.model_copy(update={"select": settings, "output": str(output), "seed": seed}).resolved()
    with Session(own, terminal) as session:
        return select(session)


def save_transfer(folder: Path, source: Path, found: Transferred, verified: dict[str, Any] | None) -> None:
    """Write ``subset.safetensors`` and ``transfer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    found.subset.save(folder / SUBSET)
    solution = {
        key: getattr(found.subset.choice, key) for key in ("value", "bound", "gap", "status", "unmapped", "mapped")
    }
    content = {"from": str(source), "to": found.config.model.name, **solution, "trained": found.subset.count}
    save_json(
        folder / "transfer.json", {**content, "verified": undefined_as_null(verified), "provenance": provenance()}
    )


def _density_correlation(found: Transferred, measured: Statistics) -> float:
    """Return Spearman's correlation over tensors of the predicted and the measured densities."""
    predicted = [found.profiles.at(info) for info in found.groups.parameters]
    own = tensor_densities(measured, found.method, found.reach)
    known = [index for index, curve in enumerate(predicted) if curve is not None]
    return float(spearmanr([predicted[index][-1] for index in known], own[known]).statistic)  # type: ignore[index]


def _structure(config: Config) -> PreTrainedModel:
    model = config.model
    try:
        target = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except CONFIG_ERRORS as error:
        raise AdapeftError(f"--to {model.name!r}: has no config of a model ({str(error).splitlines()[0]}).") from error
    quantization = stored_quantization(target) or model.quantization
    if quantization not in (None, "none"):
        raise AdapeftError(
            f"--to {model.name!r}: is quantized ({quantization}), and a transferred subset belongs to the weights of "
            f"the target's checkpoint. Choose for the quantized base with adapeft select, or transfer without "
            f"model.quantization."
        )
    return build_structure(target, model.task, trust_remote_code=model.trust_remote_code)


def _checkpoint(config: Config, structure: PreTrainedModel) -> Checkpoint | None:
    """Return the target's weights on disk; None if there is only a config."""
    folder = Path(config.model.name)
    if folder.is_dir() and not has_weights(folder):
        return None
    return open_checkpoint(config.model.name, structure, config.model.revision)


def _scores(
    config: Config, settings: Transfer, groups: Groups, checkpoint: Checkpoint | None, key: Mapping[str, Any]
) -> Scores | None:
    if groups.granularity not in ("row", "element"):
        if settings.inside != "auto":
            raise AdapeftError(
                f"inside = {settings.inside}: {groups.granularity} groups are trained whole. Leave it out."
            )
        return None
    if settings.inside == "gradient":
        return _by_gradient(config, groups, key)
    return None if checkpoint is None else _by_weight_norm(groups, checkpoint)


def _by_weight_norm(groups: Groups, checkpoint: Checkpoint) -> Scores:
    """Return squared norms of rows or squared values of elements, reading one tensor at a time."""
    places = {info.name: index for index, info in enumerate(groups.parameters)}
    scores: dict[int, Tensor] = {}
    for name, tensor in checkpoint.tensors(places):
        scores[places[name]] = _of_groups(groups, places[name], tensor.float().square().flatten())
    return scores.__getitem__


def _by_gradient(config: Config, groups: Groups, key: Mapping[str, Any]) -> Scores:
    """Return squared mean gradients over the calibration."""
    with _passes(config, groups, key) as passes:
        passes.warm_up(passes.calibration.batches)
        mean = mean_gradient(passes, "gradient", passes.calibration.batches)
    return lambda index: _of_groups(groups, index, mean[index].square())


def _by_slope(config: Config, groups: Groups, source: Statistics, key: Mapping[str, Any]) -> Statistics:
    """Return the target's slopes (direction from half A, slopes from half B) with the source's curvature."""
    select = config.select
    if not (isinstance(select, AdaPEFTOptions) and {"slope", "curvature"} <= source.columns.keys()):
        raise AdapeftError(f"inside = slope: {config.select.method} measures no slopes. Give inside=gradient.")
    curvatures = Profiles.of(source, _curvature)
    with _passes(config, groups, key) as passes:
        passes.warm_up(passes.calibration.half_a)
        direction = measure_direction(passes, select.direction)
        passes.warm_up(passes.calibration.half_b)
        slopes = mean_gradient(passes, "slope", passes.calibration.half_b)
        for slope, along in zip(slopes, direction, strict=True):
            slope.mul_(along)
        return with_own_slopes(curvatures, passes.shards, groups, slopes)


def _curvature(columns: dict[str, Tensor]) -> Tensor:
    """Return the curvature column, or its mean over the points of a probe."""
    curvature = columns["curvature"]
    return curvature.mean(dim=1) if curvature.ndim == 2 else curvature


@contextmanager
def _passes(config: Config, groups: Groups, key: Mapping[str, Any]) -> Iterator[Passes]:
    """Yield passes over the calibration through the whole target in this process.

    Raises:
        AdapeftError: the data has changed since the source was measured, by the hash in its ``key``.
    """
    inputs = load_inputs(config)
    measured, found = key.get(content_key("data.train")), inputs.description.content["data.train"]
    if measured not in (None, found) and config.data.train == key["data.train"]:
        raise AdapeftError(
            f"data.train = {config.data.train}: its content has changed since the source was measured "
            f"({measured[:12]} then, {found[:12]} now). Restore the old data, or measure the source again."
        )
    model = inputs.model()
    select = config.select
    calibration = draw_calibration(len(inputs.train), select.calibration, select.batch_size, 1, config.seed)
    with measuring_mode(model, restore=groups.always_train):
        check_loss(model, inputs, world_size=1)
        shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train)
        passes = Passes(shards, inputs.objective, calibration, inputs.train.collate, config.seed)
        yield ready(get_method(select.method), passes, groups, select)


def _of_groups(groups: Groups, index: int, squares: Tensor) -> Tensor:
    return squares if groups.granularity == "element" else groups.sums(index, 0, squares)[1]


def _show(subset: Subset, verified: Mapping[str, Any] | None, terminal: Terminal) -> None:
    """Show the share of the target with a counterpart in the source, and how close the subset is to its own best."""
    unmapped, mapped = ", ".join(subset.choice.unmapped or ()), subset.choice.mapped
    terminal.pairs({"mapped": f"{mapped:.1%} of the parameters" + (f"; not {unmapped}" if unmapped else "")})
    if verified is None:
        return
    table = number_table("subset", "influence captured", "overlap")
    for name in ("transferred", "uniform", "random"):
        if name in verified:
            table.add_row(name, f"{verified[name]['captured']:.1%}", f"{verified[name]['overlap']:.1%}")
    terminal.console.print(table)
    terminal.pairs({"densities": f"rank correlation {verified['density_correlation']:.2f} over the tensors"})

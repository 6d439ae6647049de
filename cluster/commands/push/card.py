"""Model cards: what was trained, how, with which result, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from adapeft.config.config import Config
from adapeft.deltas.delta import Delta
from adapeft.sections.paths import is_local
from adapeft.tasks.registry import TASKS
from cluster.commands.push.repository import IDENTITY
from cluster.output.report import figures_of

_MOST_LABELS = 20
"""Number of labels up to which the loading code names them."""


def card_of_run(
    config: Config, metrics: Mapping[str, Any], delta: Delta, repository: str, identity: str, pictures: Sequence[Path]
) -> ModelCard:
    """Return the card of a run's delta.

    Args:
        config: config of the run.
        metrics: content of its ``metrics.json``.
        delta: its delta.
        repository: name of the repository.
        identity: hash of the delta's file.
        pictures: pictures that are uploaded, in ``pictures/``.
    """
    base, train = config.model.name, config.train
    figures = figures_of(config, metrics) | {
        "model": _shown(base),
        "data": _shown(config.data.train),
        "evaluated on": _shown(config.data.evaluation),
        "budget": str(config.select.budget),
        "training": f"{metrics['num_steps']:,} steps of {train.batch_size} examples, AdamW, learning rate "
        f"{metrics.get('learning_rate', train.learning_rate):g}, {train.lr_scheduler_type}; best at step "
        f"{metrics['best_step']:,}",
        "seed": str(config.seed),
    }
    versions = metrics.get("provenance", {}).get("versions", {})
    body = [
        f"What adapeft changed of {_link(base)} for {config.model.task}: a small file that is added to the pretrained "
        "weights, which it checks by their fingerprint.",
        *("## Results", _table(figures)),
        *(f"![{picture.stem}](pictures/{picture.name})" for picture in pictures),
        *("## Loading", "With adapeft installed:", _code(_loading(config, delta, repository))),
        *(_merging(delta, base, config.model.revision, repository) if _can_be_merged(delta) else []),
        *([f"The base was quantized to {delta.quantization} while it was loaded."] if delta.quantization else []),
        f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}." if versions else "",
    ]
    return _card(repository, "adapeft", base, config.select.method, [config.data.train], identity, body)


def card_of_merged(delta: Delta, base: str, report: Mapping[str, Any], repository: str, identity: str) -> ModelCard:
    """Return the card of a checkpoint into which a delta was merged.

    Args:
        delta: delta that was merged.
        base: base model.
        report: content of ``adapeft_merge.json``.
        repository: name of the repository.
        identity: hash of the delta's file.
    """
    description = delta.description
    # A delta that was made in Python describes what its maker gave it.
    config = yaml.safe_load(description["config"]) if isinstance(description.get("config"), str) else {}
    data, select = config.get("data", {}), config.get("select", {})
    method, task = str(description.get("method") or "not named"), (description.get("model") or {}).get("task")
    figures = {"model": _shown(base), "method": method, "changed": f"{delta.count:,} parameters"}
    figures |= {name: _shown(str(data[name])) for name in ("train", "evaluation") if name in data}
    figures |= {name: str(select[name]) for name in ("budget", "groups") if name in select}
    figures |= {name: f"{value:.4f}" for name, value in description.get("scores", {}).items()}
    for whose, scores in report.get("scores", {}).items():
        figures |= {f"{name}, {whose}": f"{value:.4f}" for name, value in scores.items()}
    lost = report["rounding"]["lost"]
    if lost:
        figures["lost to rounding"] = f"{lost:,} of {report['rounding']['entries']:,} changes"
    body = [
        f"{_link(base)}, trained with adapeft{f' for {task}' if task else ''}; a plain checkpoint, which needs no "
        "adapeft.",
        *("## Results", _table(figures)),
        *(["## Loading", _code(_loading_merged(task, repository))] if task in TASKS else []),
    ]
    sets = [data["train"]] if "train" in data else []
    return _card(repository, "transformers", base, method, sets, identity, body)


def _card(
    repository: str, library: str, base: str, method: str, data: Iterable[str], identity: str, body: Iterable[str]
) -> ModelCard:
    sets = [source.partition("@")[0].partition(":")[0] for source in data if not _is_here(source)]
    about = ModelCardData(
        base_model=None if _is_here(base) else base,
        datasets=sets or None,
        library_name=library,
        tags=["adapeft", method],
    )
    about[IDENTITY] = identity
    lines = [f"# {repository.rpartition('/')[2]}", *filter(None, body)]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")


def _loading(config: Config, delta: Delta, repository: str) -> str:
    """Return lines of Python that load the base and apply the delta."""
    kind = TASKS[config.model.task].auto_class
    labels = (delta.description.get("model") or {}).get("labels") or {}
    options = [f'"{_shown(config.model.name)}"']
    if config.model.revision is not None:
        options.append(f'revision="{config.model.revision}"')
    if config.model.trust_remote_code:
        options.append("trust_remote_code=True")
    if labels.get("id2label") and len(labels["id2label"]) <= _MOST_LABELS:
        options.append(f"id2label={ {int(index): name for index, name in labels['id2label'].items()} }")
    elif labels.get("num_labels"):
        options.append(f"num_labels={labels['num_labels']}")
    if labels.get("problem_type"):
        options.append(f'problem_type="{labels["problem_type"]}"')
    return (
        "import adapeft\n"
        "from huggingface_hub import hf_hub_download\n"
        f"from transformers import {kind}\n\n"
        f"model = {kind}.from_pretrained({', '.join(options)})\n"
        f'delta = adapeft.Delta.load(hf_hub_download("{repository}", "delta.safetensors"))\n'
        "delta.apply(model)"
    )


def _can_be_merged(delta: Delta) -> bool:
    return all(change.part.changes_parameter for change in delta.changes.values())


def _merging(delta: Delta, base: str, revision: str | None, repository: str) -> list[str]:
    options = f"--model {_shown(base)}{f' --revision {revision}' if revision else ''} --out merged"
    options += " --unquantized" * bool(delta.quantization)
    return ["Or as a plain checkpoint:", f"```\nadapeft merge hf://{repository}/delta.safetensors {options}\n```"]


def _loading_merged(task: str, repository: str) -> str:
    kind = TASKS[task].auto_class
    reader = "AutoImageProcessor" if TASKS[task].reads_images else "AutoTokenizer"
    return (
        f"from transformers import {kind}, {reader}\n\n"
        f'model = {kind}.from_pretrained("{repository}")\n'
        f'{"processor" if TASKS[task].reads_images else "tokenizer"} = {reader}.from_pretrained("{repository}")'
    )


def _is_here(place: str) -> bool:
    """Whether ``place`` is a file or folder rather than a name on the hub; the run may be of another machine."""
    return is_local(place) or Path(place).is_absolute()


def _shown(place: str) -> str:
    """Return a name on the hub as it is, and of a path, which means nothing elsewhere, the last part."""
    return Path(place).name if _is_here(place) else place


def _link(base: str) -> str:
    return f"`{_shown(base)}`" if _is_here(base) else f"[{base}](https://huggingface.co/{base})"


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |".replace("\n", " ") for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _code(lines: str) -> str:
    return f"```python\n{lines}\n```"

"""Terminal output: the plan, progress, the choice, the summary. Lines instead of bars if the output is no terminal."""

from __future__ import annotations

import math
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from adapeft.config.config import Config
from adapeft.errors import RoundingWarning
from adapeft.sections.cluster import Cluster
from adapeft.sections.paths import is_url
from adapeft.subset.choice import in_one_step
from adapeft.subset.verdict import verdict_of
from adapeft.tasks.registry import TASKS
from cluster.events import Report
from cluster.terminal.progress import watching
from cluster.units import percent_of, size_of

if TYPE_CHECKING:
    # The terminal exists before torch is imported, because it shows that torch is being imported.

    from adapeft.deltas.delta import Delta
    from adapeft.methods.registry import Method
    from adapeft.subset.choice import Choice
    from adapeft.subset.subset import Subset
    from cluster.inspection.inspection import Inspection
    from cluster.output.folder import RunFolder
    from cluster.output.frontier import RunFrontier

_BLOCK_INDEX = re.compile(r"\.\d+\.")
_ROLES_SHOWN = 8
_FLAT = 1e-3
_NAME_WIDTH = 11


class Terminal:
    """Prints everything that a command shows."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, markup=False)

    def note(self, text: str) -> None:
        """Print a dimmed line."""
        self.console.print(text, style="dim", soft_wrap=True)

    @classmethod
    def on_stderr(cls) -> Terminal:
        """Return a terminal on standard error, for commands that print their result, such as a path, to stdout."""
        return cls(Console(stderr=True, highlight=False, markup=False))

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Print each ``RoundingWarning`` issued in the block as a note."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", RoundingWarning)
            show = warnings.showwarning

            def note(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
                if issubclass(category, RoundingWarning):
                    self.note(str(message))
                else:
                    show(message, category, *place, **options)

            warnings.showwarning = note
            yield

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show ``text`` while the block runs."""
        if self.console.is_terminal:
            with self.console.status(f"{text} …"):
                yield
        else:
            self.console.print(f"{text} …")
            yield

    @contextmanager
    def checking(self) -> Iterator[Report]:
        """Yield a function that shows how far the check of a config is."""
        with watching(self.console, "checking config, data and model …") as report:
            yield report

    def show_inputs(self, config: Config, inspection: Inspection) -> None:
        """Show the model and the data of an evaluation."""
        self.pairs({"model": _model(inspection), **_inputs(config, inspection)})

    def show_plan(self, config: Config, inspection: Inspection) -> None:
        """Show the matched parameters, the budget and the inputs before anything runs."""
        groups = inspection.groups
        always = f", and {inspection.num_always_trained:,} always trained" if inspection.num_always_trained else ""
        self.pairs(
            {
                "model": _model(inspection),
                "matched": f"{int(groups.counts.sum()):,} parameters in {len(groups.parameters):,} tensors, "
                f"by {', '.join(config.select.kinds)}",
                **({"groups": inspection.auto} if inspection.auto else {}),
                "trainable": f"{_at_most(inspection)} ({inspection.budget / groups.num_total:.3%} of the model)"
                f"{always}",
                **_inputs(config, inspection),
                "output": short(config.output),
            }
        )

    @contextmanager
    def watch(self, stage: str) -> Iterator[Report]:
        """Yield a function that shows the events of a stage."""
        with watching(self.console, f"{stage}: starting workers", f"{stage}: ") as report:
            yield report

    def show_choice(self, subset: Subset) -> None:
        """Show the chosen parameters by role, and how close to optimal the choice is."""
        trained: Counter[tuple[str, str]] = Counter()
        for name, part in subset.parts.items():
            trained[without_block_index(name), part.kind] += part.count
        table = plain_table()
        table.add_column("drawn" if subset.choice.is_drawn else "trained" if subset.choice.num_drawn else "chosen")
        table.add_column("as")
        table.add_column("parameters", justify="right")
        table.add_column("share", justify="right")
        for (role, kind), count in trained.most_common(_ROLES_SHOWN):
            table.add_row(role, kind, f"{count:,}", f"{count / max(subset.count, 1):.1%}")
        rest = len(trained) - _ROLES_SHOWN
        if rest > 0:
            count = subset.count - sum(count for _, count in trained.most_common(_ROLES_SHOWN))
            table.add_row(f"{rest} other roles", "", f"{count:,}", f"{count / subset.count:.1%}")
        if trained:
            self.console.print(table)
        self.show_empty(subset)
        pairs = {"influence": _influence(subset.choice), **_bought(subset.choice, subset.count)}
        if (verdict := verdict_of(subset.choice)) is not None:
            pairs["verdict"] = verdict.text
        if unreached := subset.choice.unreached:
            pairs["left out"] = f"{', '.join(unreached)}: no calibration batch gives them a gradient"
        self.pairs(pairs)

    def show_empty(self, subset: Subset) -> None:
        """Show a notice if the choice is empty."""
        from adapeft.subset.empty import announcement

        notice = announcement(subset)
        if notice is not None:
            self.console.print(notice, style="yellow", soft_wrap=True)

    def show_markdown(self, text: str) -> None:
        """Render Markdown, such as a report."""
        self.console.print(Markdown(text))

    def show_methods(self, methods: Mapping[str, Method]) -> None:
        table = plain_table()
        for title in ("method", "family", "trains", "cost of choosing", "source"):
            table.add_column(title)
        for name, method in methods.items():
            table.add_row(name, method.family, method.summary, method.cost, method.source)
        self.console.print(table)

    def show_summary(self, config: Config, metrics: dict[str, Any], folder: RunFolder) -> None:
        """Summarize a finished run in a few lines."""
        from adapeft.subset.choice import Choice

        choice = Choice.unchecked(metrics["choice"])
        before, after, metric = metrics["before"], metrics["after"], metrics["metric"]
        total = metrics["total_parameters"]
        bytes_per_value = 2 if config.model.dtype == "bfloat16" else 4
        full = (total + metrics["always_trained_parameters"]) * bytes_per_value
        trained = metrics["trainable_parameters"]
        always = metrics["always_trained_parameters"]
        head = f", and {always:,} always trained" if always else ""
        loss = "" if metric == "loss" else f"   (loss {_change(before, after, 'loss')})"
        rows: dict[str, str | tuple[str, ...]] = {
            "trained": f"{trained:,} of {total:,} parameters ({trained / total:.3%}){head}",
            "influence": _influence(choice),
            **_bought(choice, trained),
            metric: _change(before, after, metric) + loss,
            **_answered(before, after),
            "delta": f"{size_of(metrics['delta_bytes'])}, 1/{full / metrics['delta_bytes']:.0f} of the model's "
            f"{size_of(full)}",
            "seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items()),
            "files": f"{short(folder.path)}/ with {', '.join(sorted(path.name for path in folder.path.glob('[!.]*')))}",
            "merge": (
                f"adapeft merge {short(folder.delta)} \\",
                f"  --model {_short_name(config.model.name)} \\",
                *_for_unquantized(config, folder),
                "  --out DIR",
            ),
        }
        self.console.rule("done", style="dim")
        self.pairs(rows)
        if after["loss"] >= before["loss"]:
            self.console.print("The loss did not fall. Try another train.learning_rate or more epochs.", style="yellow")

    def show_frontier(self, run: RunFrontier) -> None:
        """Show the predicted influence under other budgets, without those that hardly add to the one above."""
        from adapeft.choose.fewest import ENOUGH
        from cluster.output.frontier import knee_of

        front = run.curve
        table = plain_table()
        for name in ("budget", "parameters", "influence", "gap"):
            table.add_column(name, justify="right")
        table.add_column("")
        has_knee = len(front.budgets) > 1 and front.values[-1] > 0
        knee = front.budgets[knee_of(front.costs, front.values)] if has_knee else None
        marks = {"this run": run.budget, "knee": knee, f"{ENOUGH:.0%} of this run": run.enough}
        shown = 0.0
        for budget, value, gap in zip(front.budgets, front.values, front.gaps, strict=True):
            note = ", ".join(name for name, marked in marks.items() if budget == marked)
            if not note and abs(value) < (1 + _FLAT) * shown:
                continue
            shown = abs(value)
            cells = (percent_of(budget / run.num_total), f"{budget:,}", f"{value:.4g}", f"{gap:.1e}", note)
            table.add_row(*cells, style="bold" if budget == run.budget else None)
        self.console.print(table)

    def show_delta(self, delta: Delta, path: Path) -> None:
        """Show which parameters a delta changes and where it comes from."""
        description = delta.description
        base = description.get("model", {}).get("name", "not named")
        scores = ", ".join(f"{name} {value:.4f}" for name, value in description.get("scores", {}).items())
        self.pairs(
            {
                "base": f"{base}, fingerprint {delta.fingerprint[:12]}",
                "method": str(description.get("method", "not named")),
                **_sources(description),
                "changed": f"{delta.count:,} parameters of {len(delta.changes)} tensors, {len(delta.new)} new tensors"
                + (f", {len(delta.buffers)} buffers" if delta.buffers else ""),
                "scores": scores or "none",
                "size": size_of(path.stat().st_size),
            }
        )

    def show_scores(self, scores: dict[str, float]) -> None:
        self.pairs({name: f"{value:.4f}" for name, value in scores.items()})

    def show_compared(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Show the metrics of several models side by side, by the model's name."""
        table = number_table("", *scores)
        for metric in next(iter(scores.values())):
            table.add_row(metric, *(f"{found[metric]:.4f}" for found in scores.values()))
        self.console.print(table)

    def pairs(self, rows: Mapping[str, str | tuple[str, ...]]) -> None:
        """Print names and values, wrapped only between words, so that paths stay whole and can be copied."""
        name_width = max(_NAME_WIDTH, *(len(name) + 1 for name in rows))
        width = max(self.console.width - name_width, 40)
        for name, value in rows.items():
            lines = (
                value  # a command's own lines
                if isinstance(value, tuple)
                else textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)
            )
            for index, line in enumerate(lines):
                head = Text(f"{'' if index else name:<{name_width}}", style="bold")
                self.console.print(head + Text(line), soft_wrap=True)


def plain_table() -> Table:
    """Return a table without lines."""
    return Table(box=None, header_style="bold", pad_edge=False)


def number_table(first: str, *numbers: str) -> Table:
    """Return a table with a column of names and right-aligned columns of numbers."""
    table = plain_table()
    table.add_column(first, overflow="fold")
    for title in numbers:
        table.add_column(title, justify="right")
    return table


def _change(before: Mapping[str, float], after: Mapping[str, float], metric: str) -> str:
    return f"{before[metric]:.4f} → {after[metric]:.4f}"


def _for_unquantized(config: Config, folder: RunFolder) -> Iterator[str]:
    """Yield the options that merge what was trained on a quantized base, with the scores of both models."""
    if config.model.quantization in ("int8", "nf4"):
        yield f"  --unquantized --evaluate {short(folder.config)} \\"


def _model(inspection: Inspection) -> str:
    return f"{inspection.architecture}, {inspection.groups.num_total:,} parameters"


def _at_most(inspection: Inspection) -> str:
    if inspection.limit is None:
        return f"at most {inspection.budget:,}"
    return f"about {inspection.budget:,}, as many as fit {size_of(inspection.limit.limit)} per device"


def _inputs(config: Config, inspection: Inspection) -> dict[str, str]:
    data = inspection.description
    device = "GPU" if config.cluster.gpus_per_worker else "CPU"
    read = {
        "data.train": (config.data.train, data.num_train),
        "data.evaluation": (config.data.evaluation, data.num_evaluation),
    }
    return {
        **_beyond_training(config, inspection),
        "data": TASKS[config.model.task].summary(data, config.data),
        **({"changed": "; ".join(inspection.notes)} if inspection.notes else {}),
        "read": ", ".join(_counted(source, rows, data.lines.get(field)) for field, (source, rows) in read.items()),
        "workers": f"{_workers(config.cluster)} ({device}), ZeRO stage {config.cluster.zero_stage}",
    }


def _beyond_training(config: Config, inspection: Inspection) -> dict[str, str]:
    """Return a remark if ``data.max_length`` exceeds the positions that the model was trained with, else nothing."""
    trained = getattr(inspection.model_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(trained, int) or config.data.max_length <= trained:
        return {}
    exceeded = f"data.max_length = {config.data.max_length} exceeds the {trained} that the model was trained with"
    return {"positions": f"{exceeded}; positions are relative, so it runs, but results may be worse beyond them"}


def _counted(source: str, num_rows: int | None, num_lines: int | None) -> str:
    """Return the number of rows and of the lines they came from: a CSV with line breaks in its texts has more lines."""
    name = source.rpartition("/")[2]
    if num_rows is None:
        return f"{name} as a stream"
    of = "" if num_lines is None else f" of {num_lines:,} {'in all' if name.endswith('.parquet') else 'lines'}"
    return f"{num_rows:,} rows{of} in {name}"


def _workers(cluster: Cluster) -> str:
    return f"{cluster.fewest} to {cluster.workers}" if cluster.fewest < cluster.workers else str(cluster.workers)


def _influence(choice: Choice) -> str:
    chosen, groups = choice.num_chosen, choice.num_groups
    share = "" if chosen is None or groups in (None, chosen) else f"; {chosen:,} of {groups:,} groups"
    if choice.value is None:
        use = "not measured" if choice.reliability is None else "not used"
        return f"{use}{', drawn at random' if choice.is_drawn else ''}{share}"
    if choice.bound is None:
        return f"{choice.value:.4g} predicted jointly{share}"
    gap = f"gap {choice.gap:.1e}" if choice.gap else "gap 0"
    status = str(choice.status).replace("_", " ")
    summed = "summed, each group at its own best step" if choice.reach in ("inf", math.inf) else "summed over groups"
    kind = f"{summed}{in_one_step(choice.joint_value)}" if choice.adds_up else "predicted"
    return f"{choice.value:.4g} {kind}, bound {choice.bound:.4g}, {gap} ({status}){share}"


def _sources(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the weighted sources of a sum of deltas, empty for any other delta."""
    terms = [f"{source['weight']:g} · {source['name']}" for source in description.get("sources", ())]
    return {"sources": ", ".join(terms)} if terms else {}


def without_block_index(name: str) -> str:
    """Return a parameter's name with the block number replaced by ``*``, so that it is the same for all blocks."""
    return _BLOCK_INDEX.sub(".*.", name)


def _answered(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, str]:
    """Return the scores of generated answers, if any were generated."""
    names = {"exact_match": "exact match", "rouge_l": "ROUGE-L", "bleu": "BLEU"}
    changes = [f"{name} {before[key]:.4g} → {after[key]:.4g}" for key, name in names.items() if key in after]
    return {"answers": ", ".join(changes)} if changes else {}


def _bought(choice: Choice, count: int) -> dict[str, str]:
    """Return what a budget in bytes or ``auto`` bought, and the part of a budget that would not lower the loss."""
    pairs = {}
    if choice.memory_per_device is not None and choice.memory_bytes is not None:
        paid = f"{size_of(choice.memory_bytes)} of {size_of(choice.memory_per_device)} per device"
        pairs["memory"] = f"{paid} for {count:,} parameters; the rest holds the model and its activations"
    if choice.share is not None:
        pairs["budget"] = (
            f"{count:,} parameters, which promise {choice.share:.0%} of the loss decrease of the most that auto allows"
        )
    if choice.unspent:
        left = f"{choice.unspent:,} parameters of the budget"
        pairs["unspent"] = f"{left}: more parameters would not lower the predicted loss"
    if choice.num_drawn:
        pairs["drawn"] = (
            f"{choice.num_drawn:,} parameters of the budget: more choices would not lower the predicted loss"
        )
    return pairs


def short(path: str | Path) -> str:
    """Return the path relative to the working directory if that is shorter; a URL stays as it is."""
    if is_url(str(path)):
        return str(path)
    return min(os.path.relpath(path), str(path), key=len)


def _short_name(model: str) -> str:
    return short(model) if os.path.exists(model) else model

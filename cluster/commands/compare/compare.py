"""``adapeft compare``: every method at every budget under every seed, each run an ``adapeft run`` of its own.

A run that is finished is not run again, and one that fails is reported and loses nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.config.keys import flatten
from adapeft.errors import AdapeftError
from adapeft.sections.budget import Budget
from cluster.commands.compare.examples import perturbed
from cluster.commands.compare.run import Counter, Job, Line, Note, Run, Runner, budgets_of, job_of, run_command
from cluster.commands.compare.sweep import swept_rates
from cluster.output.contents import KnownContents
from cluster.output.lock import hold
from cluster.output.place import check_is_folder

_NOT_COMPARED = {
    "select.memory_per_device": "budgets says how much each method may train",
    "select.statistics": "each method measures for itself",
    "train.subset": "each method chooses its own",
}
"""Keys that would decide for every method what is to be compared, and why none may."""


def compare(config: Config, comparison: Comparison, note: Note, run: Runner | None = None) -> list[Run]:
    """Sweeps the learning rates, then runs everything.

    Args:
        config: of every run, but for what is compared.
        note: is told of every run that ends.
        run: what runs one; ``run_command`` when None.

    Raises:
        AdapeftError: another comparison is at work in the folder.
    """
    lock = hold(Path(config.output))
    try:
        return _compare(config, comparison, note, run or partial(run_command, contents=KnownContents()))
    finally:
        lock.release()


def _compare(config: Config, comparison: Comparison, note: Note, run: Runner) -> list[Run]:
    folder = Path(config.output)
    rates = swept_rates(config, comparison, note, run) if comparison.learning_rates else {}

    examples = {seed: perturbed(config, comparison.perturb, seed, folder / "data") for seed in comparison.seeds}
    done = Counter(len(comparison.seeds) * sum(len(budgets_of(one, comparison)) for one in comparison.methods), note)

    def one_run(line: Line, contender: Contender, budget: Budget, seed: int) -> Run:
        swept = rates.get((contender, budget))
        job = job_of(folder, comparison, contender, budget, seed, swept.rate if swept else None)
        # At a rate that no sweep has found the run would stand in the report as if one had.
        return line.give_up(job, f"sweep: {swept.failure}") if swept and swept.failure else line.run(job)

    def run_all(seed: int, contender: Contender) -> list[Run]:
        line = Line(examples[seed], run, done)
        return [one_run(line, contender, budget, seed) for budget in budgets_of(contender, comparison)]

    with ThreadPoolExecutor(comparison.parallel) as pool:
        lines = pool.map(lambda line: run_all(*line), product(comparison.seeds, comparison.methods))
        return [run for line in lines for run in line]


def check(config: Config, comparison: Comparison, inspect: Callable[[Config], Any]) -> None:
    """Inspects what every method asks for, before anything runs.

    Raises:
        AdapeftError: the config decides what is compared, two runs would be one, a method would not choose among what
            the config says, or cannot serve the config at all; too small a budget is left to the run, for a comparison
            goes on without it.
    """
    check_is_folder(config.output, "compare")
    given = flatten(config)
    for key, reason in _NOT_COMPARED.items():
        if given[key] is not None:
            raise AdapeftError(f"{key} = {given[key]}: in a comparison {reason}. Leave it out, or add {key}=null.")
    for name in ("methods", "seeds", "budgets", "learning_rates"):
        values = [str(value) for value in getattr(comparison, name)]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise AdapeftError(f"{name}: {twice[0]} is given twice. Name each once.")
    largest = max(comparison.budgets, key=lambda budget: budget.count(10**12))
    for contender in comparison.methods:
        _check_groups(config, contender)
        inspect(Job(contender, largest, 0, None, Path(config.output), comparison.keys).applied_to(config))


def _check_groups(config: Config, contender: Contender) -> None:
    if contender != Contender(config.select.method, "auto"):
        return
    given = config.select.kinds
    if given != (contender.granularity,):
        raise AdapeftError(
            f"methods: {contender} chooses by {contender.granularity}, the config's select by {' and '.join(given)}. "
            f"Name what is compared: {contender}:{'+'.join(given)} or {contender}:{contender.granularity}"
        )


def finished(runs: Sequence[Run]) -> bool:
    """Whether none has failed."""
    return all(run.failure is None for run in runs)

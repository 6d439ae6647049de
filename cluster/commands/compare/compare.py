"""``adapeft compare``: every method at every budget with every seed, each as a separate ``adapeft run``.

Finished runs are not repeated. A failed run is reported and does not affect the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from threading import Lock
from typing import Any

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.config.keys import flatten
from adapeft.errors import AdapeftError
from adapeft.sections.budget import Budget
from cluster.commands.compare.counter import Counter
from cluster.commands.compare.examples import perturbed
from cluster.commands.compare.line import Line
from cluster.commands.compare.machines.local import Machines
from cluster.commands.compare.machines.opening import is_on_ray
from cluster.commands.compare.run import Job, Note, Run, budgets_of, job_of, num_runs
from cluster.commands.compare.sweep import swept_rates
from cluster.commands.compare.swept import Swept
from cluster.output.lock import hold
from cluster.output.place import check_is_folder

_NOT_COMPARED = {
    "select.memory_per_device": "budgets gives the limit of each method",
    "select.statistics": "each method measures for itself",
    "train.subset": "each method chooses its own subset",
}
"""Keys that would fix for all methods what the comparison varies, and the reason why each is refused."""


def compare(
    config: Config, comparison: Comparison, note: Note, machines: Machines, show: Callable[[Sequence[Run]], None]
) -> list[Run]:
    """Sweep the learning rates, then run everything, and return the runs.

    Args:
        config: config of every run, except for the keys that are compared.
        comparison: methods, budgets, seeds and learning rates.
        note: function that is called with a line for every run that ends.
        machines: what executes the runs.
        show: function that is called with all runs that have ended, after each of them.

    Raises:
        AdapeftError: another comparison is running in the folder.
    """
    lock = hold(Path(config.output))
    try:
        return _compare(config, comparison, note, machines, show)
    finally:
        lock.release()


def _compare(
    config: Config, comparison: Comparison, note: Note, machines: Machines, show: Callable[[Sequence[Run]], None]
) -> list[Run]:
    folder = Path(config.output)
    rates = _rates(config, comparison, note, machines)
    examples = {seed: perturbed(config, comparison.perturb, seed, folder / "data") for seed in comparison.seeds}
    done = Counter(num_runs(comparison), note)
    lines = list(product(comparison.seeds, comparison.methods))
    ended: dict[int, list[Run]] = {number: [] for number in range(len(lines))}
    lock = Lock()

    def one_run(line: Line, contender: Contender, budget: Budget, seed: int) -> Run:
        swept = rates.get((contender, budget))
        job = job_of(folder, comparison, contender, budget, seed, swept.rate if swept else None)
        # If the sweep has failed, there is no rate to run at: the report would show one as if it had been found.
        run = line.give_up(job, f"sweep: {swept.failure}") if swept and swept.failure else line.run(job)
        return replace(run, swept=swept)

    def run_all(number: int) -> None:
        seed, contender = lines[number]
        line = Line(examples[seed], machines.run, done)
        for budget in budgets_of(contender, comparison):
            run = one_run(line, contender, budget, seed)
            with lock:
                ended[number].append(run)
                show(list(chain(*ended.values())))

    with machines.pool(len(lines)) as pool:
        list(pool.map(run_all, ended))
    return list(chain(*ended.values()))


def _rates(
    config: Config, comparison: Comparison, note: Note, machines: Machines
) -> dict[tuple[Contender, Budget], Swept]:
    """Return the result of the sweep, if there is one."""
    if not comparison.learning_rates:
        return {}
    if comparison.sweep == "asha":
        from cluster.commands.compare.halving.asha import asha_rates
        from cluster.commands.compare.machines.on_ray import RayMachines

        assert isinstance(machines, RayMachines), "the settings were checked"
        return asha_rates(config, comparison, note, machines)
    return swept_rates(config, comparison, note, machines)


def check(config: Config, comparison: Comparison, inspect: Callable[[Config], Any]) -> None:
    """Check the config for every method before anything runs.

    Too small a budget is not an error here but in its run, because the comparison continues without that run.

    Raises:
        AdapeftError: the config fixes a key that is compared, a value is given twice, a method would choose by other
            groups than the config gives, a method does not work with the config, or Ray is needed and missing.
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
            raise AdapeftError(f"{name}: {twice[0]} is given twice. Give each value once.")
    _check_sweep_and_reference(comparison)
    is_on_ray(config, comparison)
    largest = max(comparison.budgets, key=lambda budget: budget.count(10**12))
    for contender in comparison.methods:
        _check_groups(config, contender)
        inspect(Job(contender, largest, 0, None, Path(config.output), comparison.keys).applied_to(config))


def _check_sweep_and_reference(comparison: Comparison) -> None:
    rates, reference = comparison.learning_rates, comparison.reference
    if not rates and comparison.sweep == "asha":
        raise AdapeftError("learning_rates = []: sweep = asha compares several. Give at least two, or leave out sweep.")
    if len(rates) == 1:
        raise AdapeftError(
            f"learning_rates = [{rates[0]:g}]: a sweep compares several. Give at least two, or leave it out and set "
            f"train.learning_rate={rates[0]:g}."
        )
    if reference is not None and reference not in comparison.methods:
        raise AdapeftError(
            f"reference = {reference}: is not among methods = [{', '.join(map(str, comparison.methods))}]. Add it, or "
            "name one of them."
        )


def _check_groups(config: Config, contender: Contender) -> None:
    if contender != Contender(config.select.method, "auto"):
        return
    given = config.select.kinds
    if given != (contender.granularity,):
        raise AdapeftError(
            f"methods: {contender} chooses by {contender.granularity}, but the config's select by "
            f"{' and '.join(given)}. Give the groups: {contender}:{'+'.join(given)} or "
            f"{contender}:{contender.granularity}."
        )


def finished(runs: Sequence[Run]) -> bool:
    """Whether no run has failed."""
    return all(run.failure is None for run in runs)

"""Learning rates of a comparison by successive halving: of all that are tried, those that are behind are stopped early.

Every run is planned to its end, warmup and decay included, and runs are compared at equal steps of this plan. So a rate
is judged before its decay, and has to be behind two thirds of the others to be stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapeft.config.config import Config
from adapeft.config.experiments import Comparison, Contender
from adapeft.methods.registry import get_method
from adapeft.model.load import describe_for
from adapeft.sections.budget import Budget
from adapeft.sections.cluster import Cluster
from cluster.commands.compare.counter import Counter
from cluster.commands.compare.examples import held_out
from cluster.commands.compare.halving.trial import Tried
from cluster.commands.compare.halving.trials import REDUCTION, Ended, run_trials
from cluster.commands.compare.machines.apart import finished, outcome_of, written
from cluster.commands.compare.machines.on_ray import RayMachines
from cluster.commands.compare.run import Job, Note, Outcome, Run, budgets_of, job_of, primary_metric, with_values
from cluster.commands.compare.swept import WORST, Swept, load_swept, save_swept, value_of
from cluster.inspection.plan import plan_training
from cluster.output.folder import RunFolder
from cluster.output.identity import run_id
from cluster.output.metrics import load_metrics
from cluster.ranks.inputs import count_examples

_RUNGS = 2
"""Rungs before the end, at a ninth and at a third of the steps."""


Key = tuple[Contender, Budget]


@dataclass(frozen=True)
class _Measured:
    """What all rates of a method choose from.

    Attributes:
        statistics: folder of the statistics; None for a method that measures nothing.
        failure: reason why there are none, if measuring failed.
        seconds: seconds of measuring.
    """

    statistics: str | None = None
    failure: str | None = None
    seconds: float = 0.0


def asha_rates(config: Config, comparison: Comparison, note: Note, machines: RayMachines) -> dict[Key, Swept]:
    """Return for each method and budget the best learning rate on a held-out part of the training data.

    The sweep uses the first seed and no evaluation data. A method that measures does so once, for all rates and
    budgets. What has ended is not repeated by the next comparison in this folder.
    """
    sweep = _Sweep(config, comparison, Counter(None, note), machines)
    methods = comparison.methods
    with machines.pool(len(methods)) as pool:
        measured = dict(zip(methods, pool.map(sweep.measure, methods), strict=True))
    found: dict[Key, Swept] = {}
    left: dict[Key, dict[float, Config]] = {}
    for contender in methods:
        for budget in budgets_of(contender, comparison):
            key, its = (contender, budget), measured[contender]
            configs = sweep.configs(key, its.statistics)
            if its.failure is not None:
                found[key] = Swept(comparison.learning_rates[0], {}, its.failure)
            elif (swept := sweep.recorded(key, configs)) is not None:
                found[key] = swept
            else:
                left[key] = configs
    for key, swept in sweep.run(left).items() if left else ():
        # Measured once, which the first budget pays, as in the runs that follow.
        is_first = key[1] == budgets_of(key[0], comparison)[0]
        found[key] = swept._replace(seconds=swept.seconds + measured[key[0]].seconds * is_first)
        if swept.failure is None:
            sweep.record(key, left[key], found[key])
    return found


class _Sweep:
    """The runs of a sweep, one for each method, budget and rate."""

    def __init__(self, config: Config, comparison: Comparison, done: Counter, machines: RayMachines) -> None:
        self._folder = Path(config.output) / "asha"
        self._comparison, self._done, self._machines = comparison, done, machines
        self._metric, self._higher_is_better = primary_metric(config)
        tuning = held_out(config, comparison.tune_fraction, Path(config.output) / "data")
        num_examples = count_examples(tuning, describe_for(tuning.model, tuning.data))
        self._num_steps = plan_training(tuning.train, num_examples).num_steps
        self._first = math.ceil(self._num_steps / REDUCTION**_RUNGS)
        self._tuning = with_values(tuning, "train", eval_steps=self._first, save_steps=self._first)
        rates = sorted(comparison.learning_rates)
        # From the middle: where few run at once, the others then meet better ones at their first rung.
        self._rates = sorted(rates, key=lambda rate: abs(rates.index(rate) - len(rates) // 2))

    def configs(self, key: Key, statistics: str | None) -> dict[float, Config]:
        """Return rate → config of its run, in the order of trying."""
        return {rate: self._config(self._job(key, rate), statistics) for rate in self._rates}

    def measure(self, contender: Contender) -> _Measured:
        """Measure what all runs of a method choose from, unless an earlier comparison has."""
        if not get_method(contender.method).measures_loss:
            return _Measured()
        budget = max(budgets_of(contender, self._comparison), key=lambda budget: budget.count(10**12))
        job = self._job((contender, budget), self._rates[0])
        job = replace(job, folder=job.folder.parents[1] / "statistics")
        folder = RunFolder(job.folder)
        if not folder.subset.is_file():
            config = self._config(job, None)
            settings, log = written(config)
            status = self._machines.execute("select", settings, log)
            if status:
                return _Measured(failure=outcome_of(config, status, log)[1])
        return _Measured(str(job.folder), seconds=sum(load_metrics(folder.metrics)["seconds"].values()))

    def run(self, configs: Mapping[Key, Mapping[float, Config]]) -> dict[Key, Swept]:
        """Run the trials of these methods and budgets; return the result of each."""
        tried: list[Tried] = []
        runs: list[tuple[Key, float, Config]] = []
        for group, (key, its) in enumerate(configs.items()):
            for rate, config in its.items():
                outcome = finished(config, self._machines.contents)
                settings, log = written(config)
                events, is_finished = str(RunFolder.of(config).events), outcome is not None and outcome[1] is None
                more = self._num_steps, self._metric, self._machines.environment
                tried.append(Tried(group, str(settings), str(log), events, is_finished, *more))
                runs.append((key, rate, config))
        ended: dict[Key, dict[float, tuple[Run, Ended]]] = {key: {} for key in configs}

        def on_end(number: int, end: Ended) -> None:
            key, rate, config = runs[number]
            run = self._run_of(self._job(key, rate), config, end, Path(tried[number].log))
            ended[key][rate] = run, end
            self._done(run)

        run_trials(tried, self._first, self._higher_is_better, self._machines, on_end)
        return {key: self._swept(its) for key, its in ended.items()}

    def recorded(self, key: Key, configs: Mapping[float, Config]) -> Swept | None:
        """Return the result of an earlier sweep of these runs, unless the run of its best rate is gone."""
        swept = load_swept(self._record(key), _identities(configs))
        if swept is None:
            return None
        outcome = finished(configs[swept.rate], self._machines.contents)
        return None if outcome is None else swept._replace(failure=outcome[1])

    def record(self, key: Key, configs: Mapping[float, Config], swept: Swept) -> None:
        """Write the result of a sweep."""
        save_swept(self._record(key), swept, _identities(configs))

    def _record(self, key: Key) -> Path:
        return self._job(key, self._rates[0]).folder.with_name("asha.json")

    def _job(self, key: Key, rate: float) -> Job:
        return job_of(self._folder, self._comparison, *key, self._comparison.seeds[0], rate)

    def _config(self, job: Job, statistics: str | None) -> Config:
        return self._machines.placed(with_values(job.applied_to(self._tuning), "select", statistics=statistics))

    def _run_of(self, job: Job, config: Config, end: Ended, log: Path) -> Run:
        stopped = f"stopped at step {end.step} of {self._num_steps}, {self._metric} {end.score:.4f}"
        outcome: Outcome = None, end.failure or stopped
        if end.failure is None and end.status is not None:
            outcome = outcome_of(config, end.status, log)
        assert job.learning_rate is not None
        return Run(job.contender, job.budget, job.seed, job.folder, job.learning_rate, *outcome)

    def _swept(self, ended: Mapping[float, tuple[Run, Ended]]) -> Swept:
        """Return the best of the runs that have reached the last step."""
        values = {
            rate: value_of(run.scores, self._metric, self._higher_is_better) if run.scores else WORST
            for rate, (run, _) in ended.items()
        }
        best = max(values, key=values.__getitem__)
        failures = [run.failure for run, end in ended.values() if end.status]
        failure = None
        if values[best] == WORST:
            failure = failures[0] if failures else f"{self._metric} or loss was not finite"
        scores = {rate: run.scores[self._metric] if run.scores else end.score for rate, (run, end) in ended.items()}
        stopped = {rate: end.step for rate, (_, end) in sorted(ended.items()) if end.status is None}
        failed = dict.fromkeys((rate for rate, (_, end) in ended.items() if end.status), math.nan)
        seconds = sum(run.seconds for run, _ in ended.values())
        return Swept(best, dict(sorted((scores | failed).items())), failure, seconds, stopped)


def _identities(configs: Mapping[float, Config]) -> dict[float, str]:
    """Return rate → identity of its run, which is the same on any machines."""
    return {rate: run_id(config.model_copy(update={"cluster": Cluster()})) for rate, config in configs.items()}

"""The rank function that trains a subset. Runs under any launcher."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from adapeft.config.config import Config
from adapeft.config.write import to_yaml
from adapeft.data.batches import num_micro_batches
from adapeft.deltas.extract import extract_delta
from adapeft.errors import AdapeftError, RoundingWarning
from adapeft.files.json_numbers import decoded
from adapeft.files.mapped import on_disk
from adapeft.finite import DIVERGED, blame
from adapeft.model.load import label_options
from adapeft.model.quantized import describe_quantization
from adapeft.subset.subset import Subset
from adapeft.tasks.losses.micro_batches import example_losses
from adapeft.tune.attach import attach
from adapeft.tune.attachment import attachment_of
from cluster.events import Report
from cluster.inspection.plan import TrainingPlan, plan_training
from cluster.output.folder import RunFolder
from cluster.output.generations import save_generations
from cluster.ranks.evaluate import Evaluation, score
from cluster.ranks.head_rate import find_head_rate
from cluster.ranks.inputs import Inputs, StepBatch, check_loss, load_inputs
from cluster.ranks.peak import peak_memory
from cluster.ranks.steps import TrainingSteps
from cluster.ranks.unreached import UnreachedCheck
from cluster.zero.buffers import share_buffers
from cluster.zero.checkpoint import Checkpoints
from cluster.zero.division import division_of
from cluster.zero.engine import DistributedRanks, head_rate_of, join, release, training_engine
from cluster.zero.steps import Step


def finetune(config: Config, report: Report) -> dict[str, Any]:
    """Train the subset of the run, save the delta of the best evaluation, and return entries of ``metrics.json``."""
    ranks = join()
    report({"step": "loading model and data"})
    inputs = load_inputs(config, report=report)
    contents = inputs.claimed_contents()
    plan = plan_training(config.train, inputs.num_examples)
    model, engine = attached(inputs, plan, ranks)
    result = _Training(config, inputs, contents, plan, engine, model, ranks, report).run()
    release(engine)
    return result


def attached(inputs: Inputs, plan: TrainingPlan, ranks: DistributedRanks) -> tuple[nn.Module, DeepSpeedEngine]:
    """Return the base model with the run's subset attached, and the engine that trains it. Collective."""
    config = inputs.config
    with warnings.catch_warnings():
        # No rounding with DeepSpeed: it steps float32 copies.
        warnings.simplefilter("ignore", RoundingWarning)
        model = attach(inputs.model(division_of(config.cluster)), Subset.load(RunFolder.of(config).subset))
    train = config.train
    engine = training_engine(
        model,
        zero_stage=config.cluster.zero_stage,
        num_micro=num_micro_batches(train.batch_size, ranks.world_size, train.micro_batch_size),
        learning_rate=plan.peak,
        head_learning_rate=None if train.head_learning_rate == "auto" else train.head_learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        schedule=plan.schedule,
        offload=config.cluster.offload,
    )
    return model, engine


@dataclass
class _Progress:
    """Progress of the training, saved with every checkpoint."""

    step: int = 0
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    last: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    stream: dict[str, int] = field(default_factory=dict)


class _Training:
    """The training loop: epochs, steps, evaluations, checkpoints."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        contents: dict[str, str],
        plan: TrainingPlan,
        engine: DeepSpeedEngine,
        model: nn.Module,
        ranks: DistributedRanks,
        report: Report,
    ) -> None:
        self.config, self.inputs, self.contents, self.plan = config, inputs, contents, plan
        self.engine, self.model, self.ranks, self.report = engine, model, ranks, report
        self.folder = RunFolder.of(config)
        self.metric, self.higher_is_better = inputs.metrics.primary(config.data.metric)
        self.eval_steps = config.train.eval_steps or plan.interval
        self.save_steps = config.train.save_steps or plan.interval
        self.checkpoints = Checkpoints(self.folder.checkpoints, engine, ranks)
        self.progress = self._resumed() or self._begun()
        self.head_rate = head_rate_of(engine)
        self.steps = TrainingSteps(inputs, plan, engine, model, ranks, self.progress.step)
        self.follower = self.steps.follower
        self.unreached_check = UnreachedCheck(attachment_of(model), ranks)

    def run(self) -> dict[str, Any]:
        """Train to the end of the plan."""
        progress = self.progress
        if self.head_rate is not None:
            self.report({"step": f"learning rate of the new head: {self.head_rate:.3g}", "is_note": True})
        if not progress.before:
            self.engine.eval()
            check_loss(self.engine, self.inputs, self.ranks.world_size, self.report)
            before = score(self.engine, self.inputs, self.ranks, self.report, "before training")
            progress.before = before.scores
            self._save(before, self.folder.generations_before)
            self._report_scores(progress.before)
        self.engine.train()  # transformers loads models in evaluation mode
        started = time.perf_counter()
        losses: list[float] = []
        left = 0 if self._is_stopped else self.plan.num_steps - progress.step
        for batch in itertools.islice(self.inputs.steps(progress.step, self.report), left):
            taken = self.steps.take(batch, progress.step)
            step = progress.step = progress.step + 1
            if batch.counts is not None:
                progress.stream = vars(batch.counts)
            if taken.is_taken:
                losses.append(taken.loss)
            else:
                self._skip(batch, taken)
            is_last = step == self.plan.num_steps
            is_evaluated = step % self.eval_steps == 0 or is_last
            self.unreached_check.after_step(is_last_chance=is_evaluated)
            if losses and (step % self.config.train.logging_steps == 0 or is_last):
                self._log_loss(losses)
                losses = []
            share_buffers(self.model, self.ranks)
            if is_evaluated:
                self._evaluate()
            if step % self.save_steps == 0 or is_last or self._is_stopped:
                self.checkpoints.save(progress.step, vars(progress))
            if self._is_stopped:
                self.report({"step": "stopped early", "at": step, "best_step": progress.best_step})
                break
        return {
            "before": progress.before,
            "after": progress.best,
            "best_step": progress.best_step,
            "last": progress.last,
            "history": progress.history,
            "skipped_steps": progress.skipped,
            "metric": self.metric,
            "num_steps": self.plan.num_steps,
            **({"head_learning_rate": self.head_rate} if self.head_rate is not None else {}),
            **({"stopped_step": progress.step} if self._is_stopped else {}),
            **({"stream": progress.stream} if progress.stream else {}),
            "loop_seconds": time.perf_counter() - started,
            "peak_memory_bytes": max(self.ranks.all_gather_object(peak_memory(self.ranks.device))),
        }

    @property
    def _is_stopped(self) -> bool:
        """Whether the last ``train.early_stopping_patience`` evaluations were no better than the best one before."""
        patience, progress = self.config.train.early_stopping_patience, self.progress
        if patience is None or not progress.best or progress.step == self.plan.num_steps:
            return False
        return sum(entry["step"] > progress.best_step for entry in progress.history) >= patience

    def _skip(self, batch: StepBatch, step: Step) -> None:
        """Record a skipped step.

        Raises:
            AdapeftError: more than ``train.max_skipped_steps`` steps were skipped. Saved checkpoints are kept.
        """
        progress, most = self.progress, self.config.train.max_skipped_steps
        losses = self._example_losses(batch)
        problem = f"{step.problem}. {blame(losses, 'data.train')}"
        if len(progress.skipped) >= most:
            before = f", after {most} skipped step{'s' * (most > 1)}" if most else ""
            kept = "Checkpoints of earlier steps are kept. " if any(self.folder.checkpoints.glob("step-*")) else ""
            raise AdapeftError(
                f"{DIVERGED} at step {progress.step} of {self.plan.num_steps}{before}: {problem} {kept}Lower "
                f"train.learning_rate or raise train.warmup_ratio, correct or drop such examples, or raise "
                f"train.max_skipped_steps, the number of such steps to skip."
            )
        bad = [example for example, loss in losses.items() if not math.isfinite(loss)]
        progress.skipped.append({"step": progress.step, "problem": step.problem, "examples": bad or list(losses)})
        self.report({"step": "skipped a step", "at": progress.step, "problem": problem})

    @torch.no_grad()
    def _example_losses(self, batch: StepBatch) -> dict[int, float]:
        """Return the loss of each example by id. Collective."""
        self.engine.eval()
        objective, device = self.inputs.objective, self.ranks.device
        found = example_losses(batch.indices, batch.collate, objective, device, lambda loss: float(loss(self.engine)))
        self.engine.train()
        return found

    def _evaluate(self) -> None:
        with self.follower.as_shipped():
            self._score_and_save()

    def _score_and_save(self) -> None:
        progress = self.progress
        subject = f"{DIVERGED}, as the evaluation after step {progress.step} shows"
        found = score(self.engine, self.inputs, self.ranks, self.report, subject)
        progress.last = found.scores
        self._report_scores(progress.last)
        progress.history.append({"step": progress.step, **progress.last})
        if not self.follower.is_ready:  # a subset that still exceeds the budget is no candidate for the delta
            return
        sign = 1 if self.higher_is_better else -1
        if not progress.best or sign * progress.last[self.metric] > sign * progress.best[self.metric]:
            progress.best, progress.best_step = dict(progress.last), progress.step
            keep = partial(on_disk, folder=self.folder.path) if self.ranks.rank == 0 else _discarded
            delta = extract_delta(self.model, self._description(), full_value, keep)
            if self.ranks.rank == 0:
                delta.save(self.folder.delta)
            self._save(found, self.folder.generations)

    def _save(self, found: Evaluation, path: Path) -> None:
        if found.generations and self.ranks.rank == 0:
            save_generations(path, found.generations)

    def _description(self) -> dict[str, Any]:
        config = self.config
        labels = label_options(config.model.task, self.inputs.description)
        return {
            "model": {
                **{"name": config.model.name, "task": config.model.task, "labels": labels},
                **describe_quantization(self.model),
            },
            "method": config.select.method,
            "step": self.progress.step,
            "scores": self.progress.best,
            "config": to_yaml(config),
            "contents": self.contents,
        }

    def _resumed(self) -> _Progress | None:
        """Load the newest checkpoint into the engine and return its progress; None without a checkpoint."""
        saved = self.checkpoints.load()
        if saved is None:
            return None
        progress = _Progress(**decoded(saved))
        self.report({"step": "resuming", "done": progress.step, "total": self.plan.num_steps})
        return progress

    def _begun(self) -> _Progress:
        find_head_rate(self.engine, self.inputs, self.ranks)
        return _Progress()

    def _log_loss(self, losses: list[float]) -> None:
        mean, rate = math.fsum(losses) / len(losses), self.engine.get_lr()[0]
        self.report(
            {"step": "training", "done": self.progress.step, "total": self.plan.num_steps, "loss": mean, "lr": rate}
        )

    def _report_scores(self, scores: dict[str, float]) -> None:
        self.report({"step": "evaluated", "at": self.progress.step, "metric": self.metric, **scores})


def _discarded(value: Tensor) -> Tensor:
    """Return no values in place of ``value``: only the first rank saves the delta."""
    return value.new_empty(0)


def full_value(parameter: nn.Parameter) -> Tensor:
    """Return a trained parameter, whole and in float32, at any ZeRO stage. Collective."""
    value = safe_get_full_fp32_param(parameter)
    return parameter.detach() if value is None else value

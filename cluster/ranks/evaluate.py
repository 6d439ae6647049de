"""Evaluation on any number of ranks; every example is scored exactly once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.config.config import Config
from adapeft.data.batches import evaluation_batches
from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.finite import listed
from adapeft.tasks.answers import answer_scores
from adapeft.tasks.generation import Generation
from adapeft.tasks.metrics.metrics import Scorer
from cluster.events import Report
from cluster.output.folder import RunFolder
from cluster.ranks.answers import generate
from cluster.ranks.inputs import Inputs, load_inputs
from cluster.zero.division import division_of
from cluster.zero.engine import DistributedRanks, inference_engine, join, release


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the evaluation set, and the generated answers; none unless the config asks for some."""

    scores: dict[str, float]
    generations: list[Generation]


@torch.no_grad()
def score(
    model: nn.Module, inputs: Inputs, ranks: DistributedRanks, report: Report, subject: str = "the model"
) -> Evaluation:
    """Evaluate on the evaluation set, with a result that is identical on every rank. Collective.

    Raises:
        AdapeftError: some losses are not finite; the message starts with ``subject`` and names the examples.
    """
    config, objective = inputs.config, inputs.objective
    scorer = Scorer(inputs.metrics)
    was_training = model.training
    model.eval()
    # A rank holds at most as many examples as in training: logits of a language model dominate the memory.
    most = (config.train.micro_batch_size or config.train.batch_size) * ranks.world_size
    bad: list[int] = []
    size = min(config.train.batch_size, most)
    batches = evaluation_batches(len(inputs.evaluation), size)
    for done, batch in enumerate(batches):
        share = batch[ranks.rank :: ranks.world_size]
        # Under ZeRO-3 a forward is a collective: a rank with an empty share runs one too and discards it.
        examples = inputs.evaluation.collate(share if len(share) else batch[:1]).to(ranks.device)
        if inputs.metrics.reads_logits:
            logits = objective.forward(model, examples)
            with naming_examples(examples):
                loss_sum = objective.loss_sum(logits, examples.labels)
        else:
            logits = None
            losses = objective.example_losses(model, examples, num_labels=_largest(examples, ranks))
            loss_sum = losses.sum()
        if len(share):
            if not math.isfinite(float(loss_sum)):
                bad += _not_finite(losses if logits is None else objective.losses_of(logits, examples.labels), examples)
            scorer.update(logits, examples.labels, loss_sum, objective.predicted(examples.labels))
        report({"step": "evaluating", "done": done + 1, "total": len(batches)})
    found = sorted(example for each in ranks.all_gather_object(bad) for example in each)
    if found:
        raise AdapeftError(
            f"{subject}: the loss of {len(found):,} of the {len(inputs.evaluation):,} examples of data.evaluation is "
            f"not finite: {listed(found)} (counted from 0). If this affects all examples, the weights are the cause: "
            f"lower train.learning_rate, or check the base model. Otherwise correct or drop these examples."
        )
    gathered = ranks.all_gather_object(scorer)
    gathered[0].merge(gathered[1:])
    scores, generations = gathered[0].compute(), []
    if inputs.prompts is not None:
        generations = generate(model, inputs.prompts, math.ceil(size / ranks.world_size), ranks, report)
        scores |= answer_scores([one.answer for one in generations], [one.reference for one in generations])
    model.train(was_training)
    return Evaluation(scores, generations)


def _largest(examples: Batch, ranks: DistributedRanks) -> int:
    """Return the largest number of labels that any rank has. Collective."""
    sizes = torch.zeros(ranks.world_size, dtype=torch.int64)
    sizes[ranks.rank] = examples.labels.numel()
    return int(ranks.all_reduce(sizes).max())


def _not_finite(losses: Tensor, examples: Batch) -> list[int]:
    """Return the ids of examples whose own loss is not finite, or of all if only the sum is not finite."""
    ids: Tensor = examples.ids
    return ids[~losses.isfinite()].tolist() or ids.tolist()


def evaluate(config: Config, report: Report, delta: str | None, base: bool) -> dict[str, Any]:
    """Evaluate the base model or a tuned one, and return the fields of ``Evaluation``.

    Args:
        config: config of the run.
        report: callback for progress events.
        delta: path of the delta to apply; None for the delta of the run. Ignored with ``base``.
        base: whether to evaluate the base model without a delta.
    """
    ranks = join()
    report({"step": "loading model and data"})
    trained = None if base else Delta.load(delta or RunFolder.of(config).delta)
    inputs = load_inputs(config, None if trained is None else trained.head, report)
    model = inputs.model(division_of(config.cluster))
    if trained is not None:
        trained.add_to(model)
    engine = inference_engine(model, config.cluster.zero_stage, config.cluster.offload)
    found = score(engine, inputs, ranks, report)
    release(engine)
    return {"scores": found.scores, "generations": found.generations}

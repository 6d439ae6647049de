"""Generation of answers on any number of ranks; every prompt is answered exactly once."""

from __future__ import annotations

from torch import nn

from adapeft.data.batches import evaluation_batches
from adapeft.tasks.generation import Generation, Prompts, answer, is_independent_of_padding
from cluster.events import Report
from cluster.zero.engine import DistributedRanks, runs_in_step


def generate(
    model: nn.Module, prompts: Prompts, batch_size: int, ranks: DistributedRanks, report: Report
) -> list[Generation]:
    """Return the answers to all prompts, identical on every rank. Collective.

    Args:
        model: model, or an engine around it, in evaluation mode.
        prompts: the prompts.
        batch_size: number of prompts that a rank answers at once, unless padding changes the model's predictions.
        ranks: ranks that share the prompts.
        report: callback for progress events.
    """
    in_step = runs_in_step(model)
    if not is_independent_of_padding(model, prompts, in_step=in_step):
        batch_size = 1
    mine: dict[int, str] = {}
    batches = evaluation_batches(len(prompts), batch_size * ranks.world_size)
    for done, batch in enumerate(batches):
        share = batch[ranks.rank :: ranks.world_size].tolist()
        # A rank with an empty share takes part in the collectives of the others, and discards its answer.
        answers = answer(model, prompts, share or batch[:1].tolist(), in_step=in_step)
        mine |= dict(zip(share, answers, strict=False))
        report({"step": "generating", "done": done + 1, "total": len(batches)})
    found = {index: text for each in ranks.all_gather_object(mine) for index, text in each.items()}
    rows = zip(prompts.examples, prompts.texts, prompts.references, strict=True)
    return [Generation(*row, found[index]) for index, row in enumerate(rows)]

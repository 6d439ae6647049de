"""The cross-entropy loss of extractive question answering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapeft.data.description import Batch
from adapeft.tasks.losses.cross_entropy import Classification


class AnswerSpans(Classification):
    """Cross-entropy over the positions of a text, of an answer's first and last token: logits [n, 2, T], labels [n, 2].

    As in transformers, the mean is over both, and padding counts as positions.
    """

    summary = "cross-entropy over the positions of an answer's first and last token"
    output_names = ("start_logits", "end_logits")

    def logits_in(self, output: Any) -> Tensor:
        return torch.stack([output.start_logits, output.end_logits], 1)

    def label_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        return {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}

    def predicted(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def num_outputs(self, batch: Batch, of_another: int) -> int:
        tokens = batch.inputs.get("input_ids", batch.inputs.get("inputs_embeds"))
        return of_another if tokens is None else tokens.shape[1]

    def outputs(self, num_outputs: int) -> str:
        return (
            f"the {num_outputs} tokens of its text, 0 to {num_outputs - 1}. Set both positions of a question without "
            f"an answer in its text to 0, the first token, as the examples of transformers do"
        )

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == 3 and logits.shape[:2] == labels.shape

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return torch.zeros(len(ids), 2, dtype=torch.int64)

"""The squared error loss of regression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adapeft.data.description import Batch
from adapeft.tasks.losses.draws import uniforms, wide
from adapeft.tasks.losses.objective import Objective


class Regression(Objective):
    """Squared error (y − f)²; labels float32 [n] with logits [n, 1], or labels and logits [n, K]."""

    summary = "squared error"

    def predicted(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def outside(self, labels: Tensor, num_outputs: int) -> Tensor:
        return labels[:0].flatten()  # a target is any number

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.shape in (labels.shape, (*labels.shape, 1))

    def any_labels(self, ids: Tensor, num_outputs: int) -> Tensor:
        return torch.zeros(len(ids))

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        predictions = wide(logits).reshape(labels.shape)
        return F.mse_loss(predictions, labels.to(predictions.dtype), reduction="sum")

    @torch.no_grad()
    def sample_labels(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        # (y − f)² has Gauss-Newton matrix 2·JᵀJ; y ~ N(f, s²) gives E[gᵀg] = 4·s²·JᵀJ, so s² = 1/2.
        shape = batch.labels.shape
        normal = torch.special.ndtri(uniforms(batch.ids, shape[1:].numel(), seed)).to(logits.device)
        return logits.float().reshape(shape) + normal.float().reshape(shape) * 0.5**0.5

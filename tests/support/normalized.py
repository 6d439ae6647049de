"""A tiny text classifier with buffers that its forward changes in several ways in training mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class NormalizedConfig(PreTrainedConfig):
    model_type = "normalized"


class Codebook(nn.Module):
    """Adds the nearest of four codes, which are moving averages of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(32.0).view(4, 8) / 16 - 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(-1)
        if self.training:
            self.last = x.detach().mean(0)
            self.seen += len(x)
            self.codes = torch.stack([  # a new tensor, as many codebooks do
                0.9 * code + 0.1 * x.detach()[nearest == index].mean(0) if (nearest == index).any() else code
                for index, code in enumerate(self.codes)
            ])  # fmt: skip
        return x + self.codes[nearest]


class NormalizedForSequenceClassification(PreTrainedModel):
    """Mean embedding, batch normalization, codebook, a linear layer, classes."""

    config_class = NormalizedConfig

    def __init__(self, config: NormalizedConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(29, 8)
        self.norm = nn.BatchNorm1d(8)
        self.codebook = Codebook()
        self.dense = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
        """Return the logits, and the loss if labels are given."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (self.embedding(input_ids) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        hidden = self.codebook(self.norm(mean))
        logits = self.classifier(torch.tanh(self.dense(hidden)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("normalized", NormalizedConfig, exist_ok=True)
AutoModelForSequenceClassification.register(NormalizedConfig, NormalizedForSequenceClassification, exist_ok=True)


def make_normalized() -> NormalizedForSequenceClassification:
    """Return a model with a trained head."""
    torch.manual_seed(0)
    model = NormalizedForSequenceClassification(NormalizedConfig(num_labels=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model

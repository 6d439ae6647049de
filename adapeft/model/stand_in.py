"""Layers without weights that stand in for those that bitsandbytes quantizes while a model is loaded."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

_BLOCK, _SCALE_BLOCK = 64, 256
"""Elements per scale of 4-bit codes, and scales per scale of theirs, in bitsandbytes' defaults."""


class StandIn(nn.Linear):
    """A linear layer on the meta device in place of a quantized one.

    Its weight has the shape before packing. A pass through it holds what one through that layer does: the dequantized
    weight for a moment, and for 8 bits the input until the backward pass.

    Attributes:
        quantization: ``int8``, ``nf4`` or ``fp4``.
        is_nested: whether the scales of 4-bit codes are quantized.
        compute_dtype: dtype of the product with a 4-bit weight; None for that of the input.
    """

    quantization: str
    is_nested: bool
    compute_dtype: torch.dtype | None

    @classmethod
    def of(cls, layer: nn.Module, settings: BitsAndBytesConfig) -> Self:
        """Return the stand-in of a layer of bitsandbytes on the meta device."""
        found = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")  # type: ignore[arg-type]
        is_int8 = settings.load_in_8bit
        found.quantization = "int8" if is_int8 else settings.bnb_4bit_quant_type
        found.is_nested = settings.bnb_4bit_use_double_quant
        found.compute_dtype = None if is_int8 else settings.bnb_4bit_compute_dtype
        found.weight.requires_grad_(False)
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes and their scales.

        int8: one code per element and one float32 scale per row. 4 bits: half a byte per element and a float32 scale
        per 64, or with nested scales one byte per 64 and a float32 per 64 · 256.
        """
        count = self.in_features * self.out_features
        if self.quantization == "int8":
            return count + 4 * self.out_features
        scales = -(-count // _BLOCK)
        return -(-count // 2) + (scales + 4 * -(-scales // _SCALE_BLOCK) if self.is_nested else 4 * scales)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., in] → [..., out]."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = _Product.apply(x.to(dtype), self.weight, bias, self.quantization == "int8")
        return y.to(x.dtype)


class _Product(torch.autograd.Function):
    """The product with a dequantized weight, which is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.weight, ctx.has_bias = weight, bias is not None and bias.requires_grad
        ctx.kept = x if keeps_input else None
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        dense = torch.empty_like(ctx.weight, dtype=gradient.dtype)
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.has_bias else None
        return gradient @ dense, None, of_bias, None

"""Windows: leaves whose gradients are projections of a matrix's gradient, which is itself never computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapeft.parts.layers.leaves import Held, LeafPart
from adapeft.parts.layers.projected import Projected, ProjectedLookUp, ProjectedWeight
from adapeft.parts.part import PartAndValues


class Window(LeafPart):
    r"""Two leaves next to a matrix W, written [out, in], that add nothing because they stay at zero.

    The right leaf :math:`Z` [out, m] adds :math:`Z V^\top`, so its gradient is :math:`g V`; the left leaf :math:`Y`
    [in, m] adds :math:`\Omega Y^\top`, so its gradient is :math:`g^\top \Omega`. Memory and products are those of LoRA
    of rank m, and the weight itself needs no gradient. Windows only measure and are never saved. For fused experts
    [E, out, in], windows and leaves have one matrix for each expert.

    Args:
        output_dim: dimension of the output neurons in the parameter: 1 for ``Conv1D``, otherwise 0.
        left: Ω [out, m], float32.
        right: V [in, m], float32.

    Attributes:
        has_left: whether the left leaf is used; it costs a second product.
    """

    leaf_names = ("left", "right")

    def __init__(self, output_dim: int, left: Tensor, right: Tensor) -> None:
        self.has_left = True
        self._output_dim = output_dim
        self._left, self._right = left, right

    def buffers(self, is_linear: bool) -> dict[str, Tensor]:
        return {"left_window": self._left, "right_window": self._right}

    def added_to(self, parameter: Tensor, held: Held, training: bool) -> Tensor:
        if not _is_measured(held):
            return parameter
        projected: Tensor = ProjectedWeight.apply(parameter, bool(self._output_dim), *self._sides(held))
        return projected

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held, training: bool, transposed: bool
    ) -> Tensor:
        output = F.linear(x, weight.t() if transposed else weight, bias)
        return self.added_to_output(output, x, (output.shape[-1], x.shape[-1]), held, training)

    def added_to_output(self, output: Tensor, x: Tensor, shape: tuple[int, int], held: Held, training: bool) -> Tensor:
        if not _is_measured(held):
            return output
        projected: Tensor = Projected.apply(output, x, *self._sides(held))
        return projected

    @property
    def looks_up(self) -> bool:
        return self._output_dim == 0

    def look_up(self, tokens: Tensor, weight: Tensor, held: Held, padding_idx: int | None) -> Tensor:
        output = F.embedding(tokens, weight, padding_idx)
        if not _is_measured(held):
            return output
        projected: Tensor = ProjectedLookUp.apply(output, tokens, padding_idx, *self._sides(held))
        return projected

    def merged(self, leaves: Sequence[Tensor]) -> PartAndValues:
        raise NotImplementedError("windows are removed after measuring")

    def _sides(self, held: Held) -> tuple[Tensor | None, ...]:
        """Return the right leaf and its window, and the left ones or None."""
        left, right = held.leaves
        if not self.has_left:  # a leaf that got no gradient would still run the hooks that wait for one
            return right, held.buffers["right_window"], None, None
        return right, held.buffers["right_window"], left, held.buffers["left_window"]


def _is_measured(held: Held) -> bool:
    return torch.is_grad_enabled() and held.leaves[1].requires_grad


def random_window(sizes: tuple[int, ...], rank: int, seed: int, device: torch.device) -> Tensor:
    """Return standard normal values [*sizes, rank] in float32, the same on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, rank, generator=generator).to(device)

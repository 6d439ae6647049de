r"""Statistics of a matrix's elements as products of factors, which are as large as leaves.

The direction is :math:`d = D_r D_c^\top`, the mean gradient of half B :math:`g = G_r G_c^\top`, the diagonal of the
Fisher matrix :math:`f = F_r F_c^\top`, and

.. math:: b_{ij} = g_{ij} d_{ij}, \qquad A_{ij} = f_{ij} d_{ij}^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adapeft.measure.statistics import ElementShard

OF_ROWS = ("step_rows", "gradient_rows", "moment_rows")
OF_COLUMNS = ("step_columns", "gradient_columns", "moment_columns")
_MOMENTS = 2
"""Pairs of factors of the moments: of rows and columns, and of the mean towards which these are shrunk."""


@dataclass(frozen=True)
class FactoredShard(ElementShard):
    """Whole rows of a matrix, or whole columns of the parameter's transpose: a range along the first dimension.

    Attributes:
        tensors: ``step_rows`` [out, k] and ``step_columns`` [in, k], the same of ``gradient``, and of ``moment`` with
            k = 2, without the output neurons or inputs that the slice does not contain.
        is_transposed: whether the parameter is written [in, out].
    """

    is_transposed: bool

    is_factored: ClassVar[bool] = True

    @property
    def columns(self) -> dict[str, Tensor]:
        """See ``ElementShard.columns``; computed anew each time."""
        along = self._product("step")
        slope = self._product("gradient").mul_(along)
        curvature = along.square_().mul_(self._product("moment"))
        if self.is_transposed:
            slope, curvature = slope.t(), curvature.t()
        return {"slope": slope.flatten(), "curvature": curvature.flatten()}

    def sums(self) -> dict[str, Tensor]:
        r"""Return the sum of each column, float64 [], from the factors: the elements would take as long as all bases.

        The slopes' is :math:`\langle G_r^\top D_r, G_c^\top D_c \rangle`, and the curvatures' that of each pair of
        columns of the moments, times D, in the place of the gradient.
        """
        own = {name: tensor.double() for name, tensor in self.tensors.items()}
        rows, columns = own["step_rows"], own["step_columns"]

        def product(left: Tensor, right: Tensor) -> Tensor:
            return ((left.t() @ rows) * (right.t() @ columns)).sum()

        pairs = zip(own["moment_rows"].unbind(-1), own["moment_columns"].unbind(-1), strict=True)
        curvatures = [product(left[:, None] * rows, right[:, None] * columns) for left, right in pairs]
        return {
            "slope": product(own["gradient_rows"], own["gradient_columns"]),
            "curvature": torch.stack(curvatures).sum(),
        }

    def check(self) -> None:
        """Raise ``ValueError`` if the shapes of the factors do not fit each other and the slice."""
        out, width = len(self.tensors["moment_rows"]), len(self.tensors["moment_columns"])
        k = self.tensors["step_rows"].shape[-1]
        expected = {"moment_rows": (out, _MOMENTS), "moment_columns": (width, _MOMENTS)}
        expected |= {name: (out, k) for name in OF_ROWS[:2]} | {name: (width, k) for name in OF_COLUMNS[:2]}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if shapes != expected or out * width != self.slice.length:
            raise ValueError(f"factors {shapes} for {self.slice.length} elements")

    def _product(self, name: str) -> Tensor:
        return self.tensors[f"{name}_rows"] @ self.tensors[f"{name}_columns"].t()

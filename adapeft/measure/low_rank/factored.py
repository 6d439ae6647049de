r"""Statistics of a matrix's elements as products of factors, which are as large as a leaf.

With the direction :math:`d = D Q^\top`, the gradient of half B seen through the same window,
:math:`g = G Q^\top`, and moments of rows and columns at sampled labels,

.. math:: b_{ij} = g_{ij} d_{ij}, \qquad A_{ij} = r_i c_j\, d_{ij}^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adapeft.measure.statistics import ElementShard

FACTORS = {"step", "gradient", "basis", "rows", "columns"}
"""Names of the tensors of a factored shard."""


@dataclass(frozen=True)
class FactoredShard(ElementShard):
    """Whole rows of a matrix, or whole columns of the parameter's transpose: a range along the first dimension.

    Attributes:
        tensors: ``step`` D and ``gradient`` G [out, m], ``basis`` Q [in, m], ``rows`` r [out] and ``columns`` c [in],
            without the output neurons or inputs that the slice does not contain. r is divided by the sum of c.
        is_transposed: whether the parameter is written [in, out].
    """

    is_transposed: bool

    is_factored: ClassVar[bool] = True

    @property
    def columns(self) -> dict[str, Tensor]:
        """See ``ElementShard.columns``; computed anew each time."""
        step, gradient, basis = (self.tensors[name] for name in ("step", "gradient", "basis"))
        along = step @ basis.t()
        slope = (gradient @ basis.t()).mul_(along)
        curvature = along.square_().mul_(self.tensors["rows"][:, None]).mul_(self.tensors["columns"])
        if self.is_transposed:
            slope, curvature = slope.t(), curvature.t()
        return {"slope": slope.flatten(), "curvature": curvature.flatten()}

    def check(self) -> None:
        """Raise ``ValueError`` if the shapes of the factors do not fit each other and the slice."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        out, width = len(self.tensors["rows"]), len(self.tensors["columns"])
        rank = self.tensors["step"].shape[-1]
        expected = {
            "step": (out, rank),
            "gradient": (out, rank),
            "basis": (width, rank),
            "rows": (out,),
            "columns": (width,),
        }
        if shapes != expected or out * width != self.slice.length:
            raise ValueError(f"factors {shapes} for {self.slice.length} elements")

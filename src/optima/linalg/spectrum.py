"""The extreme eigenvalues of H scaled to a unit diagonal: what first-order steps and their stopping tests need.

Shapes: D inputs.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.linalg.products import SharedMatrix

POWER_ITERATIONS = 30
# Power iteration approaches the largest eigenvalue from below.
MARGIN = 1.2


class Spectrum:
    """H with D = diag(H), and the eigenvalues of D^-1/2 H D^-1/2, each computed once, when first needed.

    Attributes:
        hessian: H, in units of its mean diagonal from here on.
        diagonal_D: D, in the working precision.
    """

    def __init__(self, hessian: Hessian) -> None:
        self.hessian = hessian
        self._dtype = hessian.working_dtype
        self.diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).to(self._dtype)

    @cached_property
    def largest(self) -> float:
        """The largest eigenvalue, estimated from above."""
        return _largest(self.hessian.operator(self._dtype), self.diagonal_D.rsqrt())

    @cached_property
    def smallest(self) -> float:
        """The smallest eigenvalue, estimated from below."""
        return 1.0 / _largest(self.hessian.preconditioner(self._dtype), self.diagonal_D.sqrt())


def _largest(matrix: SharedMatrix, scale_D: Tensor) -> float:
    """Of diag(scale) M diag(scale), by power iteration from a fixed random vector."""
    generator = torch.Generator().manual_seed(0)
    vector_1D = torch.randn(1, len(scale_D), generator=generator, dtype=torch.float64).to(scale_D)
    norm = torch.linalg.vector_norm(vector_1D)
    for _ in range(POWER_ITERATIONS):
        vector_1D = matrix(vector_1D / norm * scale_D) * scale_D
        norm = torch.linalg.vector_norm(vector_1D)
    return MARGIN * float(norm) if len(scale_D) else 1.0

"""The extreme eigenvalues of H scaled to a unit diagonal: what first-order steps and their stopping tests need.

Shapes: D inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.linalg.products import SharedMatrix

POWER_ITERATIONS = 30
# Power iteration approaches the largest eigenvalue from below.
MARGIN = 1.2


class UnitSpectrum(NamedTuple):
    """Of D^-1/2 H D^-1/2, D = diag(H), in H's working precision.

    Attributes:
        diagonal_D: D in units of H's mean diagonal.
        largest: the largest eigenvalue, estimated from above.
        smallest: the smallest one, estimated from below.
    """

    diagonal_D: Tensor
    largest: float
    smallest: float


def unit_spectrum(hessian: Hessian) -> UnitSpectrum:
    """The spectrum of ``hessian``, found once."""

    def find() -> UnitSpectrum:
        dtype = hessian.working_dtype
        diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).to(dtype)
        largest = _largest(hessian.operator(dtype), diagonal_D.rsqrt())
        return UnitSpectrum(diagonal_D, largest, 1.0 / _largest(hessian.preconditioner(dtype), diagonal_D.sqrt()))

    return hessian.memo(unit_spectrum, find)


def _largest(matrix: SharedMatrix, scale_D: Tensor) -> float:
    """Of diag(scale) M diag(scale), by power iteration from a fixed random vector."""
    generator = torch.Generator().manual_seed(0)
    vector_1D = torch.randn(1, len(scale_D), generator=generator, dtype=torch.float64).to(scale_D)
    norm = torch.linalg.vector_norm(vector_1D)
    for _ in range(POWER_ITERATIONS):
        vector_1D = matrix(vector_1D / norm * scale_D) * scale_D
        norm = torch.linalg.vector_norm(vector_1D)
    return MARGIN * float(norm) if len(scale_D) else 1.0

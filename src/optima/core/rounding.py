"""Solved weights in a checkpoint's dtype, and the certificate of the written weights.

With the certificate of the solved row v, E(v*) >= E(v) - bound. So the written row q is within E(q) - E(v) + bound of
the optimum, and E(q) takes one product in float64.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.certificate import Verifier
from optima.core.hessian import Hessian
from optima.core.problem import ENERGY_FLOOR, PerRow, RowProblem, RowSolution
from optima.device import full_precision


@dataclass(frozen=True)
class Rounded(PerRow):
    """Rows as they are written.

    Attributes:
        weight_RD: in the checkpoint's dtype, zero off keep.
        error_R: E(q), float64.
        gap_R: certified relative suboptimality of these weights, float64; see ``optima.core.certificate``.
        least_R: what the gap is relative to, float64: E(v) - bound, which no weights on the mask fall below, or the
            certificate's floor where that is more.
    """

    weight_RD: Tensor
    error_R: Tensor
    gap_R: Tensor
    least_R: Tensor

    @property
    def excess(self) -> float:
        """Loss of all rows above what their masks must lose by the certificates, relative to that."""
        least = float(self.least_R.sum())
        return float((self.gap_R * self.least_R).sum()) / least if least else 0.0


def round_rows(hessian: Hessian, problem: RowProblem, solution: RowSolution, dtype: torch.dtype) -> Rounded:
    """Round the weights of ``solution``, which solves ``problem``, to the nearest of ``dtype``, and certify them."""
    verifier = Verifier(hessian, problem)
    # A certificate's bound again: its gap is bound / max(E - bound, floor).
    gap_R, floor_R = solution.gap_R, ENERGY_FLOOR * verifier.energy_R
    share_R = torch.where(gap_R.isinf(), 1.0, gap_R / (1.0 + gap_R))
    bound_R = torch.maximum(solution.error_R * share_R, gap_R * floor_R)
    least_R = torch.maximum(solution.error_R - bound_R, floor_R)
    if torch.promote_types(solution.weight_RD.dtype, dtype) == dtype:
        return Rounded(solution.weight_RD.to(dtype), solution.error_R, gap_R, least_R)
    largest = torch.finfo(dtype).max
    written_RD = solution.weight_RD.clamp(-largest, largest).to(dtype)
    with full_precision(), torch.no_grad():
        error_R = verifier.error(written_RD)
    above_R = (bound_R + error_R - solution.error_R).clamp_min(0.0)
    return Rounded(written_RD, error_R, torch.where(above_R == 0, 0.0, above_R / least_R), least_R)

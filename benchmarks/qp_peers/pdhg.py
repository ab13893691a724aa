"""Restarted averaged primal-dual hybrid gradient: the method of the OPTIMA paper, in plain torch, for comparison.

OPTIMA (arXiv 2512.13886) gives every row to MPAX's raPDHG (arXiv 2412.09734), which for quadratic programs is PDQP (Lu
and Yang, arXiv 2311.07710, algorithm 1). In the paper's form the pruned weights are fixed by their bounds and no other
constraint is left, so the dual variables are the reduced costs alone, and an iteration is

    x_md  = (1 - m) x_avg + m x,        m = 2 / (k + 2)
    x     = P(x - step_k (H x_md - g)),        step_k = 0.99 (k + 2) / (2 ||H||)
    x_avg = (1 - m) x_avg + m x

in variables scaled to a unit diagonal of H, restarted from the better of x and x_avg by the adaptive rule of PDLP on
the optimality residual. There is no preconditioner but the diagonal, so iterations grow with sqrt(cond(H)).

Unlike MPAX, which stops on residuals relative to the data, rows stop on the certified gap that all solvers here report.

Shapes: R rows in the batch, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.batch import RowBatch, unfinished
from optima.core.directions import fixed_directions
from optima.core.hessian import Hessian
from optima.core.problem import RowProblem, RowSolution
from optima.core.products import SharedMatrix
from optima.core.restarts import Correction, Residuals, solve_with_restarts

MAX_ITERATIONS = 2000
# Iterations between looks at the certified gap, each of which costs one more product.
CHECK_EVERY = 16
STEP = 0.99
# Of the largest eigenvalue, which power iteration approaches from below.
POWER_ITERATIONS, MARGIN = 30, 1.2
# Restart when the optimality residual has fallen by the first factor since the last restart, or by the second and
# rises again, or when the run has lasted this share of all iterations (PDLP, arXiv 2106.04756, section 4).
SUFFICIENT, NECESSARY, ARTIFICIAL = 0.2, 0.8, 0.36


@dataclass(frozen=True)
class RestartedPDHG:
    """Solve rows by raPDHG to a certified relative gap.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: per round of refinement.
    """

    gap: float = 1e-4
    max_iterations: int = MAX_ITERATIONS

    name = "pdhg"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            batch = _Batch(hessian, residuals)
            (average_RD,) = batch.run(self.gap, self.max_iterations)
            return Correction(average_RD, batch.iterations_R)

        return solve_with_restarts(hessian, problem, inner, self.gap)


class _Batch(RowBatch):
    """``point`` and ``average`` are x and x_avg as steps from the start, each with its residual g - H x on keep."""

    row_tensors = (
        *("point", "residual", "average", "average_residual", "mask"),
        *("count", "total", "anchor", "last", "error_start", "residual_start"),
    )
    results = ("average",)

    def __init__(self, hessian: Hessian, residuals: Residuals) -> None:
        super().__init__(len(residuals.residual_RD), residuals.residual_RD.device)
        self.check_every = CHECK_EVERY
        dtype = residuals.residual_RD.dtype
        self.operator, self.whitener = hessian.operator(dtype), hessian.whitener(dtype)
        self.diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).to(dtype)
        self.largest = hessian.memo((_largest, dtype), lambda: _largest(self.operator, self.diagonal_D.rsqrt()))
        self.mask, self.residual_start, self.error_start = residuals.mask_RD, residuals.residual_RD, residuals.error_R
        self.point, self.average = torch.zeros_like(self.mask), torch.zeros_like(self.mask)
        self.residual, self.average_residual = self.residual_start.clone(), self.residual_start.clone()
        self.count, self.total = self.mask.new_zeros(2, len(self.mask)).unbind()
        self.anchor = self._optimality(self.residual)
        self.last = self.anchor

    def going(self, gap: float) -> Tensor:
        bound = 0.5 * self.whitener.squared_norm(self.average_residual)
        # E at x, from H x = g - r without another product.
        gained = 0.5 * torch.linalg.vecdot(self.average, self.residual_start + self.average_residual).double()
        return unfinished(bound, self.error_start - gained, gap)

    def iterate_once(self) -> Tensor:
        momentum = (2.0 / (self.count + 2.0))[:, None]
        step = STEP * (self.count[:, None] + 2.0) / (2.0 * self.largest)
        slope = torch.lerp(self.average_residual, self.residual, momentum)
        point = self.point + step * slope / self.diagonal_D
        self.residual = self.residual - self.operator(point - self.point) * self.mask
        self.point = point
        self.average = torch.lerp(self.average, self.point, momentum)
        self.average_residual = torch.lerp(self.average_residual, self.residual, momentum)
        self.count, self.total = self.count + 1, self.total + 1
        self._restart()
        return torch.ones_like(self.rows, dtype=torch.bool)

    def _optimality(self, residual: Tensor) -> Tensor:
        """How far a gradient step would move: 0 at the optimum only."""
        norm: Tensor = torch.linalg.vecdot(residual, residual / self.diagonal_D).clamp_min(0.0).sqrt()
        return norm

    def _restart(self) -> None:
        """Rows that have made enough progress, or none for too long, start afresh from their better point."""
        at_point = self._optimality(self.residual)
        at_average = self._optimality(self.average_residual)
        candidate = torch.minimum(at_point, at_average)
        sufficient = candidate <= SUFFICIENT * self.anchor
        necessary = (candidate <= NECESSARY * self.anchor) & (candidate > self.last)
        restart = sufficient | necessary | (self.count >= ARTIFICIAL * self.total)
        self.last = candidate
        if not bool(restart.any()):
            return
        for ours, other in (("point", "average"), ("residual", "average_residual")):
            better = torch.where((at_average < at_point)[:, None], getattr(self, other), getattr(self, ours))
            setattr(self, ours, torch.where(restart[:, None], better, getattr(self, ours)))
            setattr(self, other, torch.where(restart[:, None], better, getattr(self, other)))
        self.anchor = torch.where(restart, candidate, self.anchor)
        self.count = torch.where(restart, 0.0, self.count)


def _largest(operator: SharedMatrix, scale_D: Tensor) -> float:
    """The largest eigenvalue of diag(scale) H diag(scale), estimated from above by power iteration."""
    vector_1D = fixed_directions(1, scale_D)
    norm = torch.linalg.vector_norm(vector_1D)
    for _ in range(POWER_ITERATIONS):
        vector_1D = operator(vector_1D / norm * scale_D) * scale_D
        norm = torch.linalg.vector_norm(vector_1D)
    return MARGIN * float(norm) if len(scale_D) else 1.0

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

from optima.core.cg import COMPACT, unfinished
from optima.core.hessian import Hessian
from optima.core.problem import RowProblem, RowSolution
from optima.core.products import fixed_directions, multiply
from optima.core.solvers import Correction, Residuals, solve_with_restarts

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
            return batch.run(self.gap, self.max_iterations)

        return solve_with_restarts(hessian, problem, inner, self.gap)


class _Batch:
    """Rows that still iterate: ``point`` and ``average`` are steps from the start, each with its residual on keep."""

    TENSORS = (
        *("rows", "iterations", "point", "residual", "average", "average_residual", "mask"),
        *("count", "total", "anchor", "last", "error_start", "residual_start"),
    )

    def __init__(self, hessian: Hessian, residuals: Residuals) -> None:
        self.rows = torch.arange(len(residuals.residual_RD), device=residuals.residual_RD.device)
        self.iterations = torch.zeros_like(self.rows, dtype=torch.int32)
        self.left: list[tuple[Tensor, ...]] = []
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

    def run(self, gap: float, max_iterations: int) -> Correction:
        """Iterate until no row is going; rows that are done leave when that pays."""
        for iteration in range(max_iterations):
            if iteration % CHECK_EVERY == 0:
                going_R = self.going(gap)
                if not bool(going_R.any()):
                    break
                if int(going_R.sum()) <= COMPACT * len(going_R):
                    self.keep(going_R)
            self.iterate_once()
        self.keep(torch.zeros_like(self.rows, dtype=torch.bool))
        rows, average_RD, iterations_R = (torch.cat(parts) for parts in zip(*self.left, strict=True))
        back = rows.argsort()
        return Correction(average_RD[back], iterations_R[back])

    def keep(self, going_R: Tensor) -> None:
        self.left.append((self.rows[~going_R], self.average[~going_R], self.iterations[~going_R]))
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name)[going_R])

    def going(self, gap: float) -> Tensor:
        bound = 0.5 * self.whitener.squared_norm(self.average_residual)
        # E at x, from H x = g - r without another product.
        gained = 0.5 * torch.linalg.vecdot(self.average, self.residual_start + self.average_residual).double()
        return unfinished(bound, self.error_start - gained, gap)

    def iterate_once(self) -> None:
        momentum = (2.0 / (self.count + 2.0))[:, None]
        step = STEP * (self.count[:, None] + 2.0) / (2.0 * self.largest)
        slope = torch.lerp(self.average_residual, self.residual, momentum)
        point = self.point + step * slope / self.diagonal_D
        self.residual = self.residual - multiply(point - self.point, self.operator) * self.mask
        self.point = point
        self.average = torch.lerp(self.average, self.point, momentum)
        self.average_residual = torch.lerp(self.average_residual, self.residual, momentum)
        self.count, self.total = self.count + 1, self.total + 1
        self.iterations += 1
        self._restart()

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


def _largest(operator: Tensor, scale_D: Tensor) -> float:
    """The largest eigenvalue of diag(scale) H diag(scale), estimated from above by power iteration."""
    vector_1D = fixed_directions(1, scale_D)
    norm = torch.linalg.vector_norm(vector_1D)
    for _ in range(POWER_ITERATIONS):
        vector_1D = multiply(vector_1D / norm * scale_D, operator) * scale_D
        norm = torch.linalg.vector_norm(vector_1D)
    return MARGIN * float(norm) if len(scale_D) else 1.0

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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.qp.batch import RowBatch, unfinished
from optima.qp.bounded import split, unit_spectrum
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.restarts import Correction, Residuals, solve_with_restarts

MAX_ITERATIONS = 2000
# Iterations between looks at the certified gap, each of which costs one more product.
CHECK_EVERY = 16
STEP = 0.99
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
    supports_bounds = True

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            batch = _Batch(hessian, residuals)
            (average_RD,) = batch.run(self.gap, self.max_iterations)
            return Correction(batch.start_RD + average_RD, batch.iterations_R)

        lower_RD, upper_RD = problem.box()
        problem = replace(problem, lower_RD=lower_RD, upper_RD=upper_RD)
        return solve_with_restarts(hessian, problem, inner, self.gap)


class _Batch(RowBatch):
    """``point`` and ``average`` are x and x_avg as steps from the start, each with its residual g - H x on keep."""

    row_tensors = (
        *("point", "residual", "average", "average_residual", "mask", "lower", "upper"),
        *("count", "total", "anchor", "last", "error_start", "residual_start"),
    )
    results = ("average",)

    def __init__(self, hessian: Hessian, residuals: Residuals) -> None:
        super().__init__(len(residuals.residual_RD), residuals.residual_RD.device)
        self.check_every = CHECK_EVERY
        dtype = residuals.residual_RD.dtype
        self.operator, self.check = hessian.operator(dtype), hessian.preconditioner(dtype)
        diagonal_D, self.largest, _ = unit_spectrum(hessian)
        self.diagonal_D = diagonal_D.to(dtype)
        self.mask, self.residual_start, self.error_start = residuals.mask_RD, residuals.residual_RD, residuals.error_R
        assert residuals.box is not None
        start, lower, upper = residuals.box
        self.start_RD, self.lower, self.upper = start, lower - start, upper - start
        self.point, self.average = torch.zeros_like(self.mask), torch.zeros_like(self.mask)
        self.residual, self.average_residual = self.residual_start.clone(), self.residual_start.clone()
        self.count, self.total = self.mask.new_zeros(2, len(self.mask)).unbind()
        self.anchor = self._optimality(self.point, self.residual)
        self.last = self.anchor

    def going(self, gap: float) -> Tensor:
        free, wrong = split(self.average, self.lower, self.upper, self.average_residual)
        unexplained = self.average_residual * free + wrong
        bound = 0.5 * torch.linalg.vecdot(unexplained, self.check(unexplained)).double()
        # E at x, from H x = g - r without another product.
        gained = 0.5 * torch.linalg.vecdot(self.average, self.residual_start + self.average_residual).double()
        return unfinished(bound, self.error_start - gained, gap)

    def iterate_once(self) -> Tensor:
        momentum = (2.0 / (self.count + 2.0))[:, None]
        step = STEP * (self.count[:, None] + 2.0) / (2.0 * self.largest)
        slope = torch.lerp(self.average_residual, self.residual, momentum)
        point = torch.clamp(self.point + step * slope / self.diagonal_D, self.lower, self.upper)
        self.residual = self.residual - self.operator(point - self.point) * self.mask
        self.point = point
        self.average = torch.lerp(self.average, self.point, momentum)
        self.average_residual = torch.lerp(self.average_residual, self.residual, momentum)
        self.count, self.total = self.count + 1, self.total + 1
        self._restart()
        return torch.ones_like(self.rows, dtype=torch.bool)

    def _optimality(self, point: Tensor, residual: Tensor) -> Tensor:
        """How far a projected gradient step would move: 0 at the optimum only."""
        moved = torch.clamp(point + residual / self.diagonal_D, self.lower, self.upper) - point
        norm: Tensor = torch.linalg.vecdot(moved, moved * self.diagonal_D).clamp_min(0.0).sqrt()
        return norm

    def _restart(self) -> None:
        """Rows that have made enough progress, or none for too long, start afresh from their better point."""
        at_point = self._optimality(self.point, self.residual)
        at_average = self._optimality(self.average, self.average_residual)
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

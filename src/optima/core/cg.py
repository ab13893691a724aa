"""Conjugate gradient on all rows at once, preconditioned by the factor model of H (docs/mathematics.md, sections 4, 8).

Row r solves H_SS step_S = residual_S on its own kept set S. An iteration of every row is one dense product with H and
two thin ones of the preconditioner.

Nothing is known of the preconditioned spectrum. A row that seems done is measured by what the certificate uses,
1/2 ||L^-1 r||^2 with H = L L^T, and the ratio of that to 1/2 r^T z serves until the row seems done again.

Shapes: R rows in the batch, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optima.core.batch import COMPACT, RowBatch, unfinished
from optima.core.hessian import Hessian
from optima.core.preconditioner import FactorModel
from optima.core.problem import RowProblem, RowSolution
from optima.core.restarts import Correction, Residuals, solve_with_restarts

# What a row's bound is taken for, in units of 1/2 r^T z, until it has been measured.
FIRST_RATIO = 2.0


@dataclass(frozen=True)
class LowRankCG:
    """Preconditioned row by row with the factor model of H: one product an iteration, and no inverse to make.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: after which the residual is recomputed from scratch, in float64.
    """

    gap: float = 1e-4
    max_iterations: int = 150

    name = "low-rank-cg"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            batch = ConjugateGradient(hessian, residuals)
            (step_RD,) = batch.run(residuals.aim(self.gap), self.max_iterations)
            return Correction(step_RD, batch.iterations_R)

        return solve_with_restarts(hessian, problem, inner, self.gap)


class ConjugateGradient(RowBatch):
    """The rows that still iterate. A slope that is not positive is a breakdown at the working precision."""

    row_tensors: ClassVar[tuple[str, ...]] = (
        *("error", "slope", "ratio", "accepted", "residual", "mask", "restricted", "step", "direction"),
    )
    results = ("step",)

    def __init__(self, hessian: Hessian, residuals: Residuals) -> None:
        super().__init__(len(residuals.residual_RD), residuals.residual_RD.device)
        dtype = residuals.residual_RD.dtype
        self.operator, self.whitener = hessian.operator(dtype), hessian.whitener(dtype)
        self.preconditioner = FactorModel.of(hessian, dtype)
        self.residual, self.mask, self.error = residuals.residual_RD, residuals.mask_RD, residuals.error_R
        self.restricted = self.preconditioner.restrict(self.mask)
        self.step = torch.zeros_like(self.residual)
        self.direction = self.preconditioner.solve(self.residual, self.mask, self.restricted)
        self.slope = torch.linalg.vecdot(self.residual, self.direction)
        self.ratio = torch.full_like(self.error, FIRST_RATIO)
        self.accepted = torch.zeros_like(self.error, dtype=torch.bool)

    def going(self, gap: float) -> Tensor:
        """See ``RowBatch``: the row's measured bound is not yet a little below ``gap``."""
        open_: Tensor = unfinished(0.5 * self.ratio * self.slope.double(), self.error, gap) & (self.slope > 0)
        seeming = (~open_ & ~self.accepted).nonzero()[:, 0]
        # Measure when enough rows could leave.
        if len(seeming) and int(open_.sum()) <= COMPACT * len(open_):
            bound = 0.5 * self.whitener.squared_norm(self.residual[seeming])
            slope = self.slope[seeming].double()
            self.ratio[seeming] = torch.where(slope > 0, 2.0 * bound / slope, FIRST_RATIO)
            missed = unfinished(bound, self.error[seeming], gap) & (slope > 0)
            self.accepted[seeming[~missed]] = True
        return ~self.accepted

    def iterate_once(self) -> Tensor:
        """One iteration of every row; returns True for rows that moved.

        Six buffers of the rows' size are live at most: residual, mask, step, direction and the two of a product.
        """
        image = self.operator(self.direction)
        curvature = torch.linalg.vecdot(self.direction, image)
        moving: Tensor = (self.slope > 0) & (curvature > 0)
        alpha = torch.where(moving, self.slope / curvature, 0.0)
        self.step.addcmul_(self.direction, alpha[:, None])
        self.residual.addcmul_(image.mul_(self.mask), alpha[:, None], value=-1.0)
        self.error = self.error - 0.5 * (alpha * self.slope).double()
        del image
        preconditioned = self.preconditioner.solve(self.residual, self.mask, self.restricted)
        slope = torch.linalg.vecdot(self.residual, preconditioned)
        beta = torch.where(moving, slope / self.slope, 0.0)
        torch.addcmul(preconditioned, self.direction, beta[:, None], out=self.direction)
        self.slope = slope
        return moving

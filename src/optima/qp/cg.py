"""Conjugate gradient on all rows at once, preconditioned (docs/mathematics.md, sections 2, 4 and 8).

Row r solves H_SS step_S = residual_S on its own kept set S. An iteration of every row is one dense product, P H, and
the preconditioner's: another one for the shared inverse, two thin ones for the factor model.

When a row is done depends on what is known of the preconditioned spectrum. Of the shared inverse, that no eigenvalue is
below 1: the Gauss-Radau rule with a node at 1 bounds the remaining error by ratio_k * 1/2 r^T K r, ratio_k <= 1 from
the coefficients of CG alone (Golub and Meurant, Matrices, Moments and Quadrature, 2010; the recurrence is Meurant and
Tichy's, Numerical Algorithms 62, 2013, eq. 3.5). The same recurrence, kept on vectors, builds the extension of the
residual that proves the bound to the certificate. Of the factor model nothing is known: a row that seems done is
measured by what the certificate uses, 1/2 ||L^-1 r||^2, and the ratio of the two serves until it seems done again.

A preconditioner whose products are rounded (bfloat16) asks for the flexible form of CG's beta (Notay 2000).

Shapes: R rows in the batch, D inputs, C rows that seem to be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.qp.batch import COMPACT, RowBatch, unfinished
from optima.qp.preconditioners import FactorModel, Preconditioner, SharedInverse
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.restarts import Correction, Residuals, solve_with_restarts

# What a row's bound is taken for, in units of 1/2 r^T z, until it has been measured.
FIRST_RATIO = 2.0


@dataclass(frozen=True)
class SharedInverseCG:
    """Preconditioned by K_SS, K = H^-1: H's own ill-conditioning cancels, two products an iteration.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: after which the residual is recomputed from scratch, in float64.
    """

    gap: float = 1e-4
    max_iterations: int = 100

    name = "shared-inverse-cg"
    supports_bounds = False

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            inverse = SharedInverse(hessian, residuals.residual_RD.dtype, exact=residuals.repeated)
            batch = Extended(hessian, inverse, residuals)
            step_RD, residual_RD = batch.run(residuals.aim(self.gap), self.max_iterations)
            extension_RD = residual_RD.sub_(residual_RD * residuals.mask_RD)
            return Correction(step_RD, batch.iterations_R, extension_RD)

        return solve_with_restarts(hessian, problem, inner, self.gap)


@dataclass(frozen=True)
class LowRankCG:
    """Preconditioned row by row with the factor model of H: one product an iteration, and no inverse to make.

    The more a row prunes the better the model holds; where little is pruned the shared inverse needs so many fewer
    iterations that it wins.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: after which the residual is recomputed from scratch, in float64.
    """

    gap: float = 1e-4
    max_iterations: int = 150

    name = "low-rank-cg"
    supports_bounds = False

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            batch = Measured(hessian, FactorModel.of(hessian, residuals.residual_RD.dtype), residuals)
            (step_RD,) = batch.run(residuals.aim(self.gap), self.max_iterations)
            return Correction(step_RD, batch.iterations_R)

        return solve_with_restarts(hessian, problem, inner, self.gap)


class ConjugateGradient(RowBatch):
    """The rows that still iterate. A subclass says when a row is done.

    A slope that is not positive is a breakdown at the working precision.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (
        *("error", "slope", "ratio", "residual", "mask", "restricted", "step", "direction"),
    )
    ratio: Tensor

    def __init__(self, hessian: Hessian, preconditioner: Preconditioner, residuals: Residuals) -> None:
        super().__init__(len(residuals.residual_RD), residuals.residual_RD.device)
        self.operator, self.preconditioner = hessian.operator(residuals.residual_RD.dtype), preconditioner
        self.residual, self.mask, self.error = residuals.residual_RD, residuals.mask_RD, residuals.error_R
        self.restricted = preconditioner.restrict(self.mask)
        self.step = torch.zeros_like(self.residual)
        self.direction = preconditioner.solve(self.residual, self.mask, self.restricted)
        self.slope = torch.linalg.vecdot(self.residual, self.direction)

    def subtract(self, image: Tensor, alpha: Tensor) -> None:
        """Take ``alpha * image`` off the residual; ``image`` may be overwritten."""
        self.residual.addcmul_(image.mul_(self.mask), alpha[:, None], value=-1.0)

    def extend(self, moving: Tensor, alpha: Tensor, growth: Tensor) -> None:
        """What a subclass keeps up to date in every iteration."""

    def iterate_once(self) -> Tensor:
        """One iteration of every row; returns True for rows that moved.

        Six buffers of the rows' size are live at most: residual, mask, step, direction and the two of a product.
        """
        image = self.operator(self.direction)
        curvature = torch.linalg.vecdot(self.direction, image)
        moving: Tensor = (self.slope > 0) & (curvature > 0)
        alpha = torch.where(moving, self.slope / curvature, 0.0)
        self.step.addcmul_(self.direction, alpha[:, None])
        self.subtract(image, alpha)
        self.error = self.error - 0.5 * (alpha * self.slope).double()
        if not self.preconditioner.rounded:
            del image
        preconditioned = self.preconditioner.solve(self.residual, self.mask, self.restricted)
        slope = torch.linalg.vecdot(self.residual, preconditioned)
        beta = growth = torch.where(moving, slope / self.slope, 0.0)
        if self.preconditioner.rounded:
            # Flexible: -z'(H p) / p'(H p) equals z'(r - r_old) / r_old'z_old without storing r_old.
            beta = torch.where(moving, -torch.linalg.vecdot(preconditioned, image) / curvature, 0.0)
        torch.addcmul(preconditioned, self.direction, beta[:, None], out=self.direction)
        self.extend(moving, alpha, growth)
        self.slope = slope
        return moving


class Extended(ConjugateGradient):
    """For the shared inverse, which is above that of every kept set: rows stop by Gauss-Radau.

    ``residual`` holds r on the kept set and, on the pruned set, the extension that the certificate will use.
    """

    results = ("step", "residual")

    def __init__(self, hessian: Hessian, preconditioner: SharedInverse, residuals: Residuals) -> None:
        super().__init__(hessian, preconditioner, residuals)
        self.ratio = torch.ones_like(self.slope)

    def going(self, gap: float) -> Tensor:
        """See ``RowBatch``: the row's own bound is not yet a little below ``gap``."""
        going: Tensor = unfinished(0.5 * (self.ratio * self.slope).double(), self.error, gap) & (self.slope > 0)
        return going

    def subtract(self, image: Tensor, alpha: Tensor) -> None:
        """From the extension too."""
        self.residual.addcmul_(image, alpha[:, None], value=-1.0)

    def extend(self, moving: Tensor, alpha: Tensor, growth: Tensor) -> None:
        """The rule's ratio, and the extension that goes with it."""
        excess = (self.ratio - alpha).clamp_min(0.0)
        self.ratio = torch.where(moving, excess / (excess + growth.clamp_min(0.0)), self.ratio).nan_to_num(1.0)
        # The extension of a row that stays is the one that it had.
        self.residual.lerp_(self.residual * self.mask, torch.where(moving, self.ratio, 0.0)[:, None])


class Measured(ConjugateGradient):
    """For any preconditioner: rows that seem done are measured as the certificate will do it."""

    row_tensors = (*ConjugateGradient.row_tensors, "accepted")
    results = ("step",)

    def __init__(self, hessian: Hessian, preconditioner: Preconditioner, residuals: Residuals) -> None:
        super().__init__(hessian, preconditioner, residuals)
        self.whitener = hessian.whitener(self.residual.dtype)
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

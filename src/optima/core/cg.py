"""Conjugate gradient on all rows at once, preconditioned by the factor model of H (docs/mathematics.md, sections 4, 8).

Row r solves H_SS step_S = residual_S on its own kept set S. An iteration of every row is one dense product with H and
two thin ones of the preconditioner. Rows that are done leave when that pays.

Nothing is known of the preconditioned spectrum. A row that seems done is measured by what the certificate uses,
1/2 ||L^-1 r||^2 with H = L L^T, and the ratio of that to 1/2 r^T z serves until the row seems done again.

Shapes: R rows that still iterate, D inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.preconditioner import FactorModel
from optima.core.problem import ENERGY_FLOOR, Correction, Residuals
from optima.core.products import ROUND_ROWS, multiply

# What a row's bound is taken for, in units of 1/2 r^T z, until it has been measured.
FIRST_RATIO = 2.0
# Aim a little below the gap that is asked, so that the certificate seldom asks for another round.
AIM = 0.9
# Rows that are done leave when at most this share of the rows is still open.
COMPACT = 0.8
# Iterations between two looks at who is done: asking a GPU for a count stalls it.
CHECK_EVERY_ON_GPU = 4


def unfinished(bound_R: Tensor, error_R: Tensor, gap: float) -> Tensor:
    """The one stopping rule: True where the bound on E - E* is not yet ``gap`` of what the optimum must lose.

    Args:
        bound_R: float64, relative to the row's energy.
        error_R: E likewise.
        gap: certified relative gap that the caller was asked for.
    """
    # A row's unit of energy is between half and twice that of the certificate's floor: at least as strict as that.
    going_R: Tensor = bound_R > AIM * gap * (error_R - bound_R).clamp_min(0.5 * ENERGY_FLOOR)
    return going_R


def conjugate_gradient(hessian: Hessian, residuals: Residuals, gap: float, max_iterations: int) -> Correction:
    """Steps that bring every row to ``gap``, or as far as ``max_iterations`` and the working precision do."""
    open_rows = _OpenRows(hessian, residuals)
    every = 1 if hessian.device.type == "cpu" else CHECK_EVERY_ON_GPU
    for iteration in range(max_iterations):
        if iteration % every == 0:
            going_R = open_rows.going(gap)
            count, total = int(going_R.sum()), len(going_R)
            if count == 0:
                break
            # oneDNN keeps what it compiles for each number of rows: of many rows, a round number stays.
            spare = -count % ROUND_ROWS if count > ROUND_ROWS else 0
            if count + spare <= COMPACT * total:
                open_rows.keep(going_R | ((~going_R).cumsum(dim=0) <= spare) if spare else going_R)
        open_rows.iterate()
    return open_rows.correction()


class _OpenRows:
    """The rows that still iterate. A slope that is not positive is a breakdown at the working precision."""

    TENSORS = (
        *("rows", "iterations", "error", "slope", "ratio", "accepted"),
        *("residual", "mask", "restricted", "step", "direction"),
    )

    def __init__(self, hessian: Hessian, residuals: Residuals) -> None:
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
        self.rows = torch.arange(len(self.error), device=self.error.device)
        self.iterations = torch.zeros_like(self.rows, dtype=torch.int32)
        self.left: list[tuple[Tensor, Tensor, Tensor]] = []

    def going(self, gap: float) -> Tensor:
        """True for rows whose measured bound is not yet a little below ``gap``."""
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

    def iterate(self) -> None:
        """One iteration of every row.

        Six buffers of the rows' size are live at most: residual, mask, step, direction and the two of a product.
        """
        image = multiply(self.direction, self.operator)
        curvature = torch.linalg.vecdot(self.direction, image)
        moving = (self.slope > 0) & (curvature > 0)
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
        self.iterations += moving.to(torch.int32)

    def keep(self, going_R: Tensor) -> None:
        """Set the other rows aside."""
        self.left.append((self.rows[~going_R], self.step[~going_R], self.iterations[~going_R]))
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name)[going_R])

    def correction(self) -> Correction:
        """The steps of all rows in their original order."""
        if not self.left:
            return Correction(self.step, self.iterations)
        self.keep(torch.zeros_like(self.accepted))
        rows, step_RD, iterations_R = (torch.cat(parts) for parts in zip(*self.left, strict=True))
        back = rows.argsort()
        return Correction(step_RD[back], iterations_R[back])

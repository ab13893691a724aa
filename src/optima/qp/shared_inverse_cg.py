"""Conjugate gradient on all rows at once, preconditioned with the shared inverse (docs/mathematics.md).

Row r solves H_SS step_S = residual_S with preconditioner K_SS, K = H^-1. One iteration of every row is two dense
products, P H and R K; the mask makes them act on each row's own S. H's ill-conditioning cancels: the preconditioned
eigenvalues are 1 / (1 - s_i^2), s_i the canonical correlations of kept and pruned inputs, so none is below 1.

That known end of the spectrum is what the stopping test lives on: the Gauss-Radau rule with a node at 1 bounds the
remaining error by ratio_k * 1/2 r^T K r, ratio_k <= 1 from the coefficients of CG alone (Golub and Meurant, Matrices,
Moments and Quadrature, 2010; the recurrence is Meurant and Tichy's, Numerical Algorithms 62, 2013, eq. 3.5). The same
recurrence, kept on vectors, builds the extension of the residual that proves the bound to the certificate.

The preconditioner's product may be rounded (bfloat16), which asks for the flexible form of CG's beta (Notay 2000).

Shapes: R rows in the batch, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.linalg.products import SharedMatrix
from optima.qp.batch import RowBatch
from optima.qp.certificate import ENERGY_FLOOR
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.restarts import Correction, Residuals, refine

# Aim a little below the tolerance, so that the certificate seldom asks for another round.
AIM = 0.9
# Then the residual is recomputed from scratch, in float64.
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class SharedInverseCG:
    """Solve rows to a certified relative gap.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: per round of refinement.
    """

    gap: float = 1e-4
    max_iterations: int = MAX_ITERATIONS

    name = "shared-inverse-cg"
    supports_bounds = False

    def prepare(self, hessian: Hessian) -> Hessian:
        """Factorise once and cast H and K for the iterations."""
        dtype = hessian.working_dtype
        hessian.operator(dtype)
        hessian.preconditioner(preconditioner_dtype(hessian.device, dtype))
        return hessian

    def solve(self, state: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            dtype = residuals.residual_RD.dtype
            fast_dtype = dtype if residuals.repeated else preconditioner_dtype(state.device, dtype)
            preconditioner = state.preconditioner(fast_dtype)
            return _Batch(state.operator(dtype), preconditioner, residuals).run(AIM * self.gap, self.max_iterations)

        return refine(state, problem, inner, self.gap)


def preconditioner_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where it multiplies an order of magnitude faster than float32, as on CUDA from 8.0 up.

    On a CPU it is at best twice as fast, which its rounding takes back in iterations (up to a fifth more).
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast and dtype == torch.float32 else dtype


class _Batch(RowBatch):
    """``residual`` holds r on the kept set and, on the pruned set, the extension that the certificate will use."""

    row_tensors = ("error", "slope", "ratio", "residual", "mask", "step", "direction")
    results = ("step", "residual")

    def __init__(self, operator: SharedMatrix, preconditioner: SharedMatrix, residuals: Residuals) -> None:
        super().__init__(len(residuals.residual_RD), residuals.residual_RD.device)
        self.operator, self.preconditioner = operator, preconditioner
        self.flexible = preconditioner.dtype != operator.dtype
        self.residual, self.mask, self.error = residuals.residual_RD, residuals.mask_RD, residuals.error_R
        self.step = torch.zeros_like(self.residual)
        self.direction = preconditioner(self.residual).mul_(self.mask)
        self.slope = torch.linalg.vecdot(self.residual, self.direction)
        self.ratio = torch.ones_like(self.slope)

    def run(self, tolerance: float, max_iterations: int) -> Correction:
        """Iterate until each row's own bound on its gap is below ``tolerance``."""
        mask_RD = self.mask
        self.iterate(lambda: self._going(tolerance), self._iterate, max_iterations)
        step_RD, residual_RD = self.collect()
        return Correction(step_RD, self.iterations_R, extension_RD=residual_RD.sub_(residual_RD * mask_RD))

    def _going(self, tolerance: float) -> Tensor:
        bound: Tensor = 0.5 * (self.ratio * self.slope).double()
        # A slope that is not positive is a breakdown: the row has reached the working precision.
        going: Tensor = (bound > tolerance * (self.error - bound).clamp_min(ENERGY_FLOOR)) & (self.slope > 0)
        return going

    def _iterate(self) -> Tensor:
        """One iteration of every row; returns True for rows that moved.

        Six buffers of the rows' size are live at most: residual, mask, step, direction and the two of a product.
        """
        image = self.operator(self.direction)
        curvature = torch.linalg.vecdot(self.direction, image)
        moving: Tensor = (self.slope > 0) & (curvature > 0)
        alpha = torch.where(moving, self.slope / curvature, 0.0)
        self.step.addcmul_(self.direction, alpha[:, None])
        self.residual.addcmul_(image, alpha[:, None], value=-1.0)
        self.error = self.error - 0.5 * (alpha * self.slope).double()
        if not self.flexible:
            del image
        preconditioned = self.preconditioner(self.residual * self.mask).mul_(self.mask)
        slope = torch.linalg.vecdot(self.residual, preconditioned)
        growth = torch.where(moving, slope / self.slope, 0.0)
        # Flexible beta: -z'(H p) / p'(H p) equals z'(r - r_old) / r_old'z_old without storing r_old.
        beta = -torch.linalg.vecdot(preconditioned, image) / curvature if self.flexible else growth
        beta = torch.where(moving, beta, 0.0)[:, None]
        torch.addcmul(preconditioned, self.direction, beta, out=self.direction)
        excess = (self.ratio - alpha).clamp_min(0.0)
        self.ratio = torch.where(moving, excess / (excess + growth.clamp_min(0.0)), self.ratio).nan_to_num(1.0)
        self.residual.lerp_(self.residual * self.mask, self.ratio[:, None])
        self.slope = slope
        return moving

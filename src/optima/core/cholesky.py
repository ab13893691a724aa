"""Direct solve of every row by a batched Cholesky factorisation on the smaller of its kept and its pruned set.

With few weights kept, the primal system H_SS v_S = r_S. With few pruned, the dual one: v = K (r - m), K = H^-1, with
multipliers m on the pruned set such that v vanishes there, K_PP m_P = (K r)_P (the optimal brain surgeon of Hassibi and
Stork, 1993, for many weights at once). A row costs min(|S|, |P|)^3 / 3 operations.

In float64 it is the oracle of the tests.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.gather import solve_selected
from optima.core.hessian import Hessian
from optima.core.problem import RowProblem, RowSolution
from optima.core.products import scaled
from optima.core.restarts import Correction, Residuals, solve_with_restarts


@dataclass(frozen=True)
class BatchedCholesky:
    """Solve rows exactly, up to rounding, then certify them.

    Args:
        gap: certified relative gap to reach; only rounding stands in the way, and restarts take most of it.
        dtype: precision of the factorisations. float32 halves their cost; rows where it does not suffice are
            factorised again in float64.
    """

    gap: float = 1e-4
    dtype: torch.dtype = torch.float64

    name = "cholesky"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            dtype = torch.promote_types(self.dtype, residuals.residual_RD.dtype)
            step_RD = solve_kept(hessian, residuals.residual_RD.to(dtype), residuals.mask_RD)
            iterations_R = torch.zeros(len(step_RD), dtype=torch.int32, device=step_RD.device)
            return Correction(step_RD.to(residuals.residual_RD.dtype), iterations_R)

        return solve_with_restarts(hessian, problem, inner, self.gap)


def solve_kept(hessian: Hessian, residual_RD: Tensor, mask_RD: Tensor) -> Tensor:
    """step with H_SS step_S = residual_S, H in units of its mean diagonal, zero off each row's own S; shape (R, D)."""
    keep_RD, unit = mask_RD > 0, hessian.mean_diagonal
    primal_R = 2 * keep_RD.sum(dim=1) <= keep_RD.shape[1]
    dtype, step_RD = residual_RD.dtype, torch.zeros_like(residual_RD)
    if bool(primal_R.any()):
        primal_DD = hessian.memo(("primal", dtype), lambda: scaled(hessian.damped_DD, 1 / unit, dtype))
        step_RD[primal_R] = solve_selected(primal_DD, residual_RD[primal_R], keep_RD[primal_R], True)
    if not bool(primal_R.all()):
        dual_DD = hessian.memo(("dual", dtype), lambda: scaled(hessian.inverse_DD, unit, dtype))
        part_RD, part_mask_RD = residual_RD[~primal_R], mask_RD[~primal_R].to(dtype)
        multiplier_RD = solve_selected(dual_DD, part_RD @ dual_DD, ~keep_RD[~primal_R], True)
        step_RD[~primal_R] = ((part_RD - multiplier_RD) @ dual_DD) * part_mask_RD
    return step_RD

"""Direct solve of every row by a batched Cholesky of its own H_SS, padded to a common size.

In float64 it is the oracle of the tests; it needs no inverse and no iterations, and costs |S|^3 / 3 a row.

Shapes: R rows, D inputs, B rows in one batch, S padded number of kept weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.qp.hessian import Hessian
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.refinement import Correction, refine

# Gathered matrices of one batch, in bytes: large enough for batched LAPACK, small beside a layer.
BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class BatchedCholesky:
    """Solve rows exactly, up to rounding, then certify them.

    Args:
        gap: certified relative gap to reach; only rounding stands in the way.
        dtype: precision of the factorisations; the oracle keeps float64.
    """

    gap: float = 1e-4
    dtype: torch.dtype = torch.float64

    name = "cholesky"

    def prepare(self, hessian: Hessian) -> Hessian:
        """Nothing but the Hessian is shared."""
        return hessian

    def solve(self, state: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``. The problem must have no bounds."""
        assert not problem.bounded, "bounds need the bounded solver"
        matrix_DD = state.damped_DD.to(self.dtype)

        def inner(residual_RD: Tensor, keep_RD: Tensor, error_R: Tensor) -> Correction:
            step_RD = solve_kept(matrix_DD, residual_RD.to(self.dtype), keep_RD)
            return Correction(step_RD.double(), torch.zeros(len(step_RD), dtype=torch.int32, device=step_RD.device))

        return refine(state, problem, inner, self.gap)


def solve_kept(matrix_DD: Tensor, residual_RD: Tensor, keep_RD: Tensor) -> Tensor:
    """step with H_SS step_S = residual_S and zero elsewhere, for each row's own S; shape (R, D)."""
    step_RD = torch.zeros_like(residual_RD)
    count_R = keep_RD.sum(dim=1)
    # Rows of similar size share a batch, so that padding stays small.
    order = count_R.argsort()
    position = 0
    while position < len(order):
        size = max(int(count_R[order[min(position + 64, len(order)) - 1]]), 1)
        batch = max(BATCH_BYTES // (2 * size * size * matrix_DD.element_size()), 1)
        rows = order[position : position + min(batch, 64)]
        step_RD[rows] = _solve_batch(matrix_DD, residual_RD[rows], keep_RD[rows], max(int(count_R[rows].max()), 1))
        position += len(rows)
    return step_RD


def _solve_batch(matrix_DD: Tensor, residual_BD: Tensor, keep_BD: Tensor, size: int) -> Tensor:
    # Kept indices first (stable), then padding, which is decoupled below.
    index_BS = keep_BD.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
    real_BS = keep_BD.gather(1, index_BS)
    gathered_BSS = matrix_DD[index_BS[:, :, None], index_BS[:, None, :]]
    gathered_BSS = gathered_BSS * (real_BS[:, :, None] & real_BS[:, None, :])
    gathered_BSS.diagonal(dim1=1, dim2=2)[~real_BS] = 1.0
    factor_BSS = torch.linalg.cholesky(gathered_BSS)
    right_BS = residual_BD.gather(1, index_BS) * real_BS
    step_BS = torch.cholesky_solve(right_BS[:, :, None], factor_BSS)[:, :, 0]
    return torch.zeros_like(residual_BD).scatter_(1, index_BS, step_BS * real_BS)

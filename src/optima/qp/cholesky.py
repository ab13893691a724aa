"""Direct solve of every row by a batched Cholesky factorisation on the smaller of its kept and its pruned set.

With few weights kept, the primal system H_SS v_S = r_S. With few pruned, the dual one: v = K (r - m), K = H^-1, with
multipliers m on the pruned set such that v vanishes there, K_PP m_P = (K r)_P (the optimal brain surgeon of Hassibi and
Stork, 1993, for many weights at once). A row costs min(|S|, |P|)^3 / 3 operations.

In float64 it is the oracle of the tests.

Shapes: R rows, D inputs, B rows in one batch, S padded size of a system.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.linalg.products import scaled
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.restarts import Correction, Residuals, solve_with_restarts

# Gathered systems and their factors hold at most D^2 numbers, or this many where D is small.
SMALLEST_BATCH_ENTRIES = 2**20


@dataclass(frozen=True)
class BatchedCholesky:
    """Solve rows exactly, up to rounding, then certify them.

    Args:
        gap: certified relative gap to reach; only rounding stands in the way, and refinement takes most of it.
        dtype: precision of the factorisations. float32 halves their cost; rows where it does not suffice are
            factorised again in float64.
    """

    gap: float = 1e-4
    dtype: torch.dtype = torch.float64

    name = "cholesky"
    supports_bounds = False

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            dtype = torch.promote_types(self.dtype, residuals.residual_RD.dtype)
            step_RD = solve_kept(hessian, residuals.residual_RD.to(dtype), residuals.mask_RD)
            iterations_R = torch.zeros(len(step_RD), dtype=torch.int32, device=step_RD.device)
            return Correction(step_RD.to(residuals.residual_RD.dtype), iterations_R)

        return solve_with_restarts(hessian, problem, inner, self.gap)


def solve_kept(hessian: Hessian, residual_RD: Tensor, mask_RD: Tensor) -> Tensor:
    """step with H_SS step_S = residual_S and zero elsewhere, for each row's own S; shape (R, D)."""
    keep_RD = mask_RD > 0
    primal_R = 2 * keep_RD.sum(dim=1) <= keep_RD.shape[1]
    dtype, step_RD = residual_RD.dtype, torch.zeros_like(residual_RD)
    if bool(primal_R.any()):
        step_RD[primal_R] = solve_selected(_primal(hessian, dtype), residual_RD[primal_R], keep_RD[primal_R])
    if not bool(primal_R.all()):
        dual_DD, part_RD, part_mask_RD = _dual(hessian, dtype), residual_RD[~primal_R], mask_RD[~primal_R].to(dtype)
        multiplier_RD = solve_selected(dual_DD, part_RD @ dual_DD, ~keep_RD[~primal_R])
        step_RD[~primal_R] = ((part_RD - multiplier_RD) @ dual_DD) * part_mask_RD
    return step_RD


def _primal(hessian: Hessian, dtype: torch.dtype) -> Tensor:
    """The damped H as a plain matrix in units of its mean diagonal."""
    return hessian.memo(("primal", dtype), lambda: scaled(hessian.damped_DD, 1 / hessian.mean_diagonal, dtype))


def _dual(hessian: Hessian, dtype: torch.dtype) -> Tensor:
    """K in the same units."""
    return hessian.memo(("dual", dtype), lambda: scaled(hessian.inverse_DD, hessian.mean_diagonal, dtype))


def solve_selected(matrix_DD: Tensor, right_RD: Tensor, select_RD: Tensor) -> Tensor:
    """x with matrix_SS x_S = right_S on each row's own selection S and zero elsewhere; zero where a factor fails."""
    solution_RD = torch.zeros_like(right_RD)
    for rows, size in _batches(select_RD.sum(dim=1), len(matrix_DD)):
        solution_RD[rows] = _solve_batch(matrix_DD, right_RD[rows], select_RD[rows], size)
    return solution_RD


def _batches(count_R: Tensor, num_inputs: int) -> Iterator[tuple[Tensor, int]]:
    """Rows in groups of equal count, then neighbours in count, with the size that their systems are padded to."""
    order = count_R.argsort(stable=True)
    sizes = count_R[order].tolist()
    position = 0
    while position < len(sizes):
        entries = max(num_inputs**2, SMALLEST_BATCH_ENTRIES) // 2
        # Counts ascend, so the last row of a batch is its largest; one step of growth is enough to bound it.
        batch = max(entries // max(sizes[position], 1) ** 2, 1)
        end = min(position + batch, len(sizes))
        while end > position + 1 and (end - position) * sizes[end - 1] ** 2 > entries:
            end -= max((end - position) // 8, 1)
        if sizes[end - 1]:
            yield order[position:end], sizes[end - 1]
        position = end


def _solve_batch(matrix_DD: Tensor, right_BD: Tensor, select_BD: Tensor, size: int) -> Tensor:
    # Selected indices first (stable), then padding, which is decoupled below.
    index_BS = select_BD.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
    real_BS = select_BD.gather(1, index_BS)
    gathered_BSS = matrix_DD[index_BS[:, :, None], index_BS[:, None, :]]
    if not bool(real_BS.all()):
        gathered_BSS *= real_BS[:, :, None] & real_BS[:, None, :]
        gathered_BSS.diagonal(dim1=1, dim2=2)[~real_BS] = 1.0
    factor_BSS, info_B = torch.linalg.cholesky_ex(gathered_BSS)
    solution_BS1 = torch.cholesky_solve((right_BD.gather(1, index_BS) * real_BS)[:, :, None], factor_BSS)
    solution_BS = torch.where((info_B == 0)[:, None], solution_BS1[:, :, 0], 0.0) * real_BS
    return torch.zeros_like(right_BD).scatter_(1, index_BS, solution_BS)

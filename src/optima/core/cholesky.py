"""Direct solve of every row by a batched Cholesky factorisation on the smaller of its kept and its pruned set.

With few weights kept, the primal system H_SS v_S = r_S. With few pruned, the dual one: v = K (r - m), K = H^-1, with
multipliers m on the pruned set such that v vanishes there, K_PP m_P = (K r)_P (the optimal brain surgeon of Hassibi and
Stork, 1993, for many weights at once). A row costs min(|S|, |P|)^3 / 3 operations.

Shapes: R rows, D inputs, S padded size of a row's system.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.products import scaled
from optima.errors import NumericalError

# Gathered systems and their factors hold at most D^2 numbers, or this many where D is small.
SMALLEST_BATCH_ENTRIES = 2**20
DEVICE_BATCH_ENTRIES = 2**24


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


def solve_selected(matrix_DD: Tensor, right_RD: Tensor, select_RD: Tensor, zero_failures: bool = False) -> Tensor:
    """x with matrix_SS x_S = right_S on each row's own selection S and zero elsewhere, (R, D) in the matrix's dtype.

    Args:
        matrix_DD: symmetric positive definite.
        right_RD: right-hand sides; what is not selected does not matter.
        select_RD: boolean.
        zero_failures: return zero for rows whose factorisation fails, for a caller that measures what it gets.

    Raises:
        NumericalError: if a factorisation fails and ``zero_failures`` is not set.
    """
    solution_RD = torch.zeros_like(right_RD, dtype=matrix_DD.dtype)
    for rows, size in _batches(select_RD.sum(dim=1), matrix_DD):
        # The selected inputs of each row, ascending, then others as padding.
        index_RS = (~select_RD[rows]).to(torch.int8).argsort(dim=1, stable=True)[:, :size]
        real_RS = select_RD[rows].gather(1, index_RS)
        factor_RSS, failed_R = torch.linalg.cholesky_ex(_systems(matrix_DD, index_RS, real_RS))
        if not zero_failures and bool(failed_R.any()):
            raise NumericalError("a row's own part of the hessian cannot be factorised: raise the damping")
        right_RS = right_RD[rows].to(matrix_DD.dtype).gather(1, index_RS) * real_RS
        solved_RS = torch.cholesky_solve(right_RS[:, :, None], factor_RSS)[:, :, 0]
        solved_RS = torch.where((failed_R == 0)[:, None], solved_RS, 0.0) * real_RS
        solution_RD[rows] = solution_RD[rows].scatter_(1, index_RS, solved_RS)
    return solution_RD


def _systems(matrix_DD: Tensor, index_RS: Tensor, real_RS: Tensor) -> Tensor:
    """``matrix_DD`` on each row's indices, (R, S, S); the identity where an index is not real."""
    if matrix_DD.device.type == "cpu":
        # Twice as fast as indexing with two tensors.
        systems_RSS = matrix_DD.new_empty(*index_RS.shape, index_RS.shape[1])
        for index_S, result_SS in zip(index_RS, systems_RSS, strict=True):
            torch.index_select(matrix_DD.index_select(0, index_S), 1, index_S, out=result_SS)
    else:
        # One flat index: of two, torch makes both as large as the result on CUDA.
        systems_RSS = matrix_DD.take(index_RS[:, :, None] * matrix_DD.shape[1] + index_RS[:, None, :])
    if not bool(real_RS.all()):
        systems_RSS *= real_RS[:, :, None] & real_RS[:, None, :]
        systems_RSS.diagonal(dim1=1, dim2=2)[~real_RS] = 1.0
    return systems_RSS


def _batches(count_R: Tensor, matrix_DD: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows in groups of equal count, then neighbours in count, with the size that their systems are padded to."""
    order = count_R.argsort(stable=True)
    sizes = count_R[order].tolist()
    smallest = SMALLEST_BATCH_ENTRIES if matrix_DD.device.type == "cpu" else DEVICE_BATCH_ENTRIES
    entries = max(matrix_DD.numel(), smallest) // 2
    position = 0
    while position < len(sizes):
        # Counts ascend, so the last row of a batch is its largest; one step of growth is enough to bound it.
        batch = max(entries // max(sizes[position], 1) ** 2, 1)
        end = min(position + batch, len(sizes))
        while end > position + 1 and (end - position) * sizes[end - 1] ** 2 > entries:
            end -= max((end - position) // 8, 1)
        if sizes[end - 1]:
            yield order[position:end], sizes[end - 1]
        position = end

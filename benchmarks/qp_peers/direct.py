"""A Cholesky of every row's own H_SS: a peer, and the float64 oracle.

Shapes: R rows, D inputs, B rows in a batch, S kept weights of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.core import Hessian, RowProblem

# Gathered matrices of one batch: large enough for batched LAPACK and cuSOLVER, small compared with a linear.
BATCH_BYTES = 256 * 2**20


def cholesky_rows(hessian: Hessian, problem: RowProblem, dtype: torch.dtype) -> Tensor:
    """Solve H_SS v_S = (H w)_S for each row by its own factorisation; rows of equal count share a batch; (R, D)."""
    symmetric_DD = 0.5 * (hessian.damped_DD + hessian.damped_DD.mT)  # all that the objective sees of H
    matrix_DD = symmetric_DD.to(dtype)
    linear_RD = (problem.target_RD.double() @ symmetric_DD).to(dtype)
    weight_RD = torch.zeros_like(linear_RD)
    count_R = problem.keep_RD.sum(dim=1)
    for count in count_R.unique().tolist():
        rows = (count_R == count).nonzero()[:, 0]
        batch = max(BATCH_BYTES // (max(count, 1) ** 2 * matrix_DD.element_size()), 1)
        for part in rows.split(batch):
            index_BS = problem.keep_RD[part].nonzero()[:, 1].reshape(len(part), count)
            factor_BSS = torch.linalg.cholesky(matrix_DD[index_BS[:, :, None], index_BS[:, None, :]])
            right_BS1 = linear_RD[part].gather(1, index_BS)[:, :, None]
            weight_RD[part] = weight_RD[part].scatter(1, index_BS, torch.cholesky_solve(right_BS1, factor_BSS)[:, :, 0])
    return weight_RD

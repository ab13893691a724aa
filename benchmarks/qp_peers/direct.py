"""Direct peers: a Cholesky of every row's own H_SS (also the float64 oracle), and general QP solvers row by row.

Shapes: R rows, D inputs, B rows in a batch, S kept weights of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from optima.core import Hessian, RowProblem

# Gathered matrices of one batch: large enough for batched LAPACK and cuSOLVER, small compared with a layer.
BATCH_BYTES = 256 * 2**20


Solve = Callable[[np.ndarray, np.ndarray], np.ndarray]


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


def row_by_row(solve: Solve, hessian: Hessian, problem: RowProblem) -> Tensor:
    """Hand a general solver each row's reduced problem (kept variables only, no constraints left): its easiest form."""
    matrix_DD = hessian.damped_DD.cpu().numpy()
    linear_RD = (problem.target_RD.double() @ hessian.damped_DD).cpu().numpy()
    weight_RD = np.zeros_like(linear_RD)
    for row, keep_D in enumerate(problem.keep_RD.cpu().numpy()):
        weight_RD[row, keep_D] = solve(matrix_DD[np.ix_(keep_D, keep_D)], linear_RD[row, keep_D])
    return torch.from_numpy(weight_RD)


def piqp_solve(matrix_SS: np.ndarray, linear_S: np.ndarray) -> np.ndarray:
    """PIQP's dense interior-point method at its default accuracy (1e-8)."""
    import piqp

    solver = piqp.DenseSolver()
    solver.setup(matrix_SS, -linear_S)
    solver.solve()
    return np.asarray(solver.result.x)


def osqp_solve(matrix_SS: np.ndarray, linear_S: np.ndarray) -> np.ndarray:
    """OSQP (sparse ADMM) at eps 1e-6, which its default 1e-3 would leave far from the optimum."""
    import osqp
    from scipy import sparse

    size = len(linear_S)
    solver = osqp.OSQP()
    free = np.full(size, np.inf)
    solver.setup(
        sparse.csc_matrix(np.triu(matrix_SS)), -linear_S, sparse.eye(size, format="csc"), -free, free,
        eps_abs=1e-6, eps_rel=1e-6, max_iter=20000, verbose=False,
    )  # fmt: skip
    return np.asarray(solver.solve().x)

"""For mask searches: (H + rho I)^-1 for one penalty rho after another, and the linear in units of its inputs.

In units in which H has a unit diagonal, ||X (V - W)^T|| is the same with H_ij / (n_i n_j) and W_ij n_j. |W_ij n_j| is
then Wanda's score, which is why ADMM methods project in these units (Boza 2024, section 3.3).

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from optima.core.hessian import Hessian
from optima.core.products import fixed_directions, multiply, pack

POWERS = 10  # of a matrix, for its largest eigenvalue
MOST_EIGENVALUES = 32_766  # that LAPACK finds: the size of its work space is counted in 32 bits

# Multiplies rows by (H + penalty I)^-1 of one penalty.
Solve = Callable[[Tensor], Tensor]
Shifted = Callable[[float], Solve]


class Eigen(NamedTuple):
    """Eigenvalues and eigenvectors (columns) of the damped H in units of the inputs, in the dtype of the rows."""

    value_D: Tensor
    vector_DD: Tensor


def eigendecomposition(matrix_DD: Tensor, dtype: torch.dtype) -> Eigen:
    """Made in the dtype of ``matrix_DD``, which is in its units already, and cast to that of the rows."""
    try:
        value_D, vector_DD = torch.linalg.eigh(matrix_DD)
    except LinAlgError:  # cuSOLVER has not converged where LAPACK did (pytorch issues 94772, 105359)
        value_D, vector_DD = (each.to(matrix_DD) for each in torch.linalg.eigh(matrix_DD.double().cpu()))
    return Eigen(value_D.to(dtype), vector_DD.to(dtype))


def eigen_inverse(eigen: Eigen, rows_OD: Tensor, products: int) -> Shifted:
    """(H + rho I)^-1 for many penalties, from one eigendecomposition (as in ALPS, arXiv 2406.07831).

    Forming the matrix takes 2 D^3 operations at each change of rho and spares 2 O D^2 in every product: which is
    cheaper depends on the shape of the linear.

    Args:
        eigen: of H, in the dtype of the rows.
        rows_OD: rows as they will be multiplied.
        products: with the same rho, before it changes.
    """
    value_D, vector_DD = eigen
    to_rows = pack(vector_DD)
    if _is_formed(rows_OD, products):
        return lambda rho: _multiplier(multiply(vector_DD * (1.0 / (value_D + rho)), to_rows))
    to_eigen = pack(vector_DD.mT.contiguous())
    return lambda rho: lambda rows: multiply(multiply(rows, to_eigen).mul_(1.0 / (value_D + rho)), to_rows)


def factored_inverse(matrix_DD: Tensor, rows_OD: Tensor, products: int) -> Shifted:
    """The same for few penalties, from a Cholesky factorisation of each, without an eigendecomposition.

    That takes as long as six to twenty inverses, and is not made beyond ``MOST_EIGENVALUES``, nor by CUDA 12 beyond
    some 26,700.

    Args:
        matrix_DD: H; in float64 where the dtype of the rows has too few digits for it.
        rows_OD, products: see ``eigen_inverse``.
    """
    forms = matrix_DD.dtype != rows_OD.dtype or _is_formed(rows_OD, products)

    def at(penalty: float) -> Solve:
        shifted_DD = matrix_DD.clone()
        shifted_DD.diagonal().add_(penalty)
        factor_DD = torch.linalg.cholesky(shifted_DD)
        del shifted_DD  # a large linear has little memory
        if forms:
            return _multiplier(torch.cholesky_inverse(factor_DD).to(rows_OD.dtype))
        return lambda rows: torch.cholesky_solve(rows.mT, factor_DD).mT

    return at


def coupled_inverse(rows: Eigen, inputs: Eigen) -> Shifted:
    """X to Y with C Y H + rho Y = X, four products each, from the eigendecompositions of C, (O, O), and of H."""
    value_O, vector_OO = rows
    to_rows, to_eigen = pack(inputs.vector_DD), pack(inputs.vector_DD.mT.contiguous())

    def solve(divisor_OD: Tensor, rows_OD: Tensor) -> Tensor:
        eigen_OD = multiply(vector_OO.mT @ rows_OD, to_eigen).div_(divisor_OD)
        return vector_OO @ multiply(eigen_OD, to_rows)

    return lambda penalty: partial(solve, torch.outer(value_O, inputs.value_D).add_(penalty))


def _is_formed(rows_OD: Tensor, products: int) -> bool:
    """Whether to form the inverse for so many products: with few rows it takes longer than it spares."""
    return rows_OD.shape[1] <= products * rows_OD.shape[0]


def _multiplier(matrix_DD: Tensor) -> Solve:
    return partial(multiply, matrix=pack(matrix_DD))


def largest_eigenvalue(matrix_DD: Tensor) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, usually within 20% below: by powers of a vector."""
    if not len(matrix_DD):
        return 0.0
    (vector_D,) = fixed_directions(1, matrix_DD)
    norm = torch.zeros(())
    for _ in range(POWERS):
        vector_D = matrix_DD @ (vector_D / torch.linalg.vector_norm(vector_D))
        norm = torch.linalg.vector_norm(vector_D)
    return float(norm)


def unit_diagonal(matrix_DD: Tensor, dead_D: Tensor) -> tuple[Tensor, Tensor]:
    """H / (n n^T) and n = sqrt(diag H), float64, of an H damped or not; a dead input is decoupled and has n = 1."""
    norm_D = matrix_DD.diagonal().sqrt().masked_fill(dead_D, 1.0)
    scaled_DD = (matrix_DD / norm_D[:, None]).div_(norm_D)
    scaled_DD.diagonal().fill_(1.0)
    return scaled_DD, norm_D


def saliency_unit(hessian: Hessian, theta: float = 0.75) -> Tensor:
    """u with u_i^2 = H_ii^(1-theta) K_ii^(-theta), float64, K the inverse of the damped H.

    Removing a weight v from a row that keeps the inputs S costs twice the error v^2 / a, a = (H_SS^-1)_ii, which lies
    between 1 / H_ii (no other input can make up for it) and K_ii (all others do): v^2 u_i^2 is between the two.
    """
    own_D, left_D = hessian.damped_DD.diagonal(), 1.0 / hessian.inverse_diagonal_D
    return (own_D.pow(1.0 - theta) * left_D.pow(theta)).sqrt()


def scaled_weight(weight_OD: Tensor, hessian: Hessian, norm_D: Tensor) -> Tensor:
    """W n, in the weight's dtype; weights of dead inputs vanish."""
    return (weight_OD * norm_D.to(weight_OD.dtype)).masked_fill_(hessian.dead_D, 0.0)

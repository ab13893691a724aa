"""(H + rho I)^-1 for one penalty rho after another.

For many penalties from one eigendecomposition (as in ALPS, arXiv 2406.07831), for few from a factorisation of each. And
where rows go together: Y with C Y H + rho Y = X, from two eigendecompositions.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from optima.core.directions import fixed_directions
from optima.core.products import SharedMatrix, multiply, pack

POWERS = 10  # of a matrix, for its largest eigenvalue
MOST_EIGENVALUES = 32_766  # that LAPACK finds: the size of its work space is counted in 32 bits


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


def _is_formed(rows_OD: Tensor, products: int) -> bool:
    """Whether to form the inverse for so many products: with few rows it takes longer than it spares."""
    return rows_OD.shape[1] <= products * rows_OD.shape[0]


class ShiftedInverse:
    """(H + rho I)^-1 in the dtype of the rows that it will multiply.

    Forming the matrix takes 2 D^3 operations at each change of rho and spares 2 O D^2 in every product: which is
    cheaper depends on the shape of the linear.

    Args:
        eigen: of H, in the dtype of the rows.
        rows_OD: rows as they will be multiplied.
        products: with the same rho, before it changes.
    """

    def __init__(self, eigen: Eigen, rows_OD: Tensor, products: int) -> None:
        self._value_D, self._vector_DD = eigen
        self._to_rows = pack(self._vector_DD)
        self._forms = _is_formed(rows_OD, products)
        self._to_eigen = self._to_rows if self._forms else pack(self._vector_DD.mT.contiguous())

    def at(self, penalty: float) -> Callable[[Tensor], Tensor]:
        """Multiplies rows by (H + penalty I)^-1."""
        share_D = 1.0 / (self._value_D + penalty)
        if self._forms:
            return SharedMatrix(multiply(self._vector_DD * share_D, self._to_rows))
        return lambda rows_OD: multiply(multiply(rows_OD, self._to_eigen).mul_(share_D), self._to_rows)


class FactoredInverse:
    """The same for a few penalties, from a Cholesky factorisation of each.

    Forming the matrix takes 2 D^3 operations at each change of rho here too, and no eigendecomposition, which takes as
    long as six to twenty of that, and which is not made beyond ``MOST_EIGENVALUES``, nor by CUDA 12 beyond some 26,700.

    Args:
        matrix_DD: H; in float64 where the dtype of the rows has too few digits for it.
        rows_OD: rows as they will be multiplied.
        products: with the same rho, before it changes.
    """

    def __init__(self, matrix_DD: Tensor, rows_OD: Tensor, products: int) -> None:
        self._matrix_DD, self._dtype = matrix_DD, rows_OD.dtype
        self._forms = matrix_DD.dtype != rows_OD.dtype or _is_formed(rows_OD, products)

    def at(self, penalty: float) -> Callable[[Tensor], Tensor]:
        """Multiplies rows by (H + penalty I)^-1."""
        shifted_DD = self._matrix_DD.clone()
        shifted_DD.diagonal().add_(penalty)
        factor_DD = torch.linalg.cholesky(shifted_DD)
        del shifted_DD  # a large linear has little memory
        if self._forms:
            return SharedMatrix(torch.cholesky_inverse(factor_DD).to(self._dtype))
        return lambda rows_OD: torch.cholesky_solve(rows_OD.mT, factor_DD).mT


def largest_eigenvalue(matrix_DD: Tensor) -> float:
    """Of a positive semidefinite matrix, seldom a fifth too low: by powers of a random vector."""
    if not len(matrix_DD):
        return 0.0
    (vector_D,) = fixed_directions(1, matrix_DD)
    norm = torch.zeros(())
    for _ in range(POWERS):
        vector_D = matrix_DD @ (vector_D / torch.linalg.vector_norm(vector_D))
        norm = torch.linalg.vector_norm(vector_D)
    return float(norm)


class CoupledInverse:
    """X to Y with C Y H + rho Y = X, four products each.

    Args:
        rows: eigendecomposition of C, (O, O), in the dtype of the rows.
        inputs: that of H.
    """

    def __init__(self, rows: Eigen, inputs: Eigen) -> None:
        self._rows, self._value_D = rows, inputs.value_D
        self._to_rows, self._to_eigen = pack(inputs.vector_DD), pack(inputs.vector_DD.mT.contiguous())

    def at(self, penalty: float) -> Callable[[Tensor], Tensor]:
        """X to Y by this penalty."""
        value_O, vector_OO = self._rows
        divisor_OD = torch.outer(value_O, self._value_D).add_(penalty)

        def solve(rows_OD: Tensor) -> Tensor:
            eigen_OD = multiply(vector_OO.mT @ rows_OD, self._to_eigen).div_(divisor_OD)
            return vector_OO @ multiply(eigen_OD, self._to_rows)

        return solve
